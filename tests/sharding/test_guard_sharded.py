"""The guard of the switch, where processes share every network: each keeps its parts, and all return together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from tests.sharding.test_sharded import largest_difference, train
from tests.tiny import save_tiny_pipeline

ERRORS = ["--errors", '{"1": 0.1, "2": 0.15, "3": 9.0, "4": 0.1, "5": 0.1}']
"""The switch comes after the first step, the return after the third."""
TRAINED = ["--solution", "discrete", "--ema", *ERRORS]
CASES = [
    pytest.param("fsdp2", ["--lora", "2"], id="fsdp2"),
    pytest.param("deepspeed_stage_3", [], id="deepspeed_stage_3", marks=pytest.mark.slow),
    pytest.param("fsdp2", [], id="fsdp2-whole", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return save_tiny_pipeline(tmp_path_factory.mktemp("teacher"))


def facts(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "facts.json").read_text())
    return {name: found[name] for name in ("switched", "returned", "solution")}


RETURNED = {"switched": 1, "returned": 3, "solution": "discrete"}


@pytest.mark.parametrize(("strategy", "lora"), CASES)
def test_it_returns_to_the_weights_of_the_switch_also_when_resumed(
    strategy: str, lora: list[str], pretrained: str, tmp_path: Path
) -> None:
    spread = ["--strategy", strategy, "--devices", "2", *TRAINED, *lora]

    def run(name: str, *arguments: str) -> dict[str, Tensor]:
        return train(tmp_path / name, pretrained, *arguments)

    switched = run("switched", *spread, "--steps", "1")
    returned = run("returned", *spread, "--steps", "3")
    assert facts(tmp_path / "returned") == RETURNED
    assert largest_difference(switched, returned) == 0
    # Of the validation that switched: it has the guard's weights, and the optimizer, as all checkpoints have.
    saved = FileSystemReader(tmp_path / "switched" / "best.ckpt").read_metadata().state_dict_metadata
    weights = {name.removeprefix("weights.") for name in saved if name.startswith("weights.")}
    assert {name.removeprefix("kept.") for name in saved if name.startswith("kept.")} == weights
    assert [name for name in saved if name.startswith("optimizer")]

    checkpoint = ["--resume", str(tmp_path / "returned" / "last.ckpt")]  # of the second step, between the two
    resumed = run("resumed", *spread, "--steps", "4", *checkpoint)
    assert facts(tmp_path / "resumed") == RETURNED
    # Adam makes steps of up to 1e-3 of gradients that are rounding alone, as those of few weights are.
    assert largest_difference(resumed, run("single", *TRAINED, *lora, "--steps", "4")) < 5e-5
    assert largest_difference(resumed, switched) > 1e-4  # it trains on from there


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "lora"), CASES)
def test_another_number_of_processes_returns_or_none_without_a_guard(
    strategy: str, lora: list[str], pretrained: str, tmp_path: Path
) -> None:
    spread = ["--strategy", strategy, *TRAINED, *lora]
    returned = train(tmp_path / "two", pretrained, *spread, "--devices", "2", "--steps", "3")
    checkpoint = ["--steps", "3", "--resume", str(tmp_path / "two" / "last.ckpt")]
    on = train(tmp_path / "three", pretrained, *spread, "--devices", "3", *checkpoint)
    assert facts(tmp_path / "three") == RETURNED
    assert largest_difference(on, returned) == 0
    train(tmp_path / "unguarded", pretrained, *spread, "--devices", "2", "--unguarded", *checkpoint)
    assert facts(tmp_path / "unguarded") == {"switched": 1, "returned": None, "solution": "differential"}
