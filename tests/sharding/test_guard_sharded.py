"""Rollback of `SwitchSolution` with sharded networks: each process restores its shards at the same step."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from tests.sharding.tiny_runs import SEVERAL_RUNS, largest_difference, train

pytestmark = SEVERAL_RUNS

ERRORS = ["--errors", '{"1": 0.1, "2": 0.15, "3": 9.0, "4": 0.1, "5": 0.1}']
"""Validation errors by step: they switch after the first step, and roll back after the third."""
TRAINED = ["--solution", "discrete", "--ema", *ERRORS]
CASES = [
    pytest.param("fsdp2", ["--lora", "2"], id="fsdp2", marks=pytest.mark.slow),
    pytest.param("deepspeed_stage_3", [], id="deepspeed_stage_3", marks=pytest.mark.slow),
    pytest.param("fsdp2", [], id="fsdp2-full", marks=pytest.mark.slow),
]


def facts(path: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads((path / "facts.json").read_text())
    return {name: written[name] for name in ("switched", "returned", "solution")}


ROLLED_BACK = {"switched": 1, "returned": 3, "solution": "discrete"}


@pytest.mark.parametrize(("strategy", "lora"), CASES)
def test_rollback_restores_the_weights_of_the_switch_also_after_resuming(
    strategy: str, lora: list[str], pretrained: str, tmp_path: Path
) -> None:
    options = ["--strategy", strategy, "--devices", "2", *TRAINED, *lora]

    def run(name: str, *arguments: str) -> dict[str, Tensor]:
        return train(tmp_path / name, pretrained, *arguments)

    switched = run("switched", *options, "--steps", "1")
    rolled_back = run("rolled_back", *options, "--steps", "3")
    assert facts(tmp_path / "rolled_back") == ROLLED_BACK
    assert largest_difference(switched, rolled_back) == 0
    # The checkpoint of the validation that switched holds the snapshot for the rollback, besides weights and optimizer states.
    saved = FileSystemReader(tmp_path / "switched" / "best.ckpt").read_metadata().state_dict_metadata
    weights = {name.removeprefix("weights.") for name in saved if name.startswith("weights.")}
    assert weights
    assert {name.removeprefix("snapshot.") for name in saved if name.startswith("snapshot.")} == weights
    assert [name for name in saved if name.startswith("optimizer")]

    checkpoint = ["--resume", str(tmp_path / "rolled_back" / "last.ckpt")]  # of the second step, after the switch
    resumed = run("resumed", *options, "--steps", "4", *checkpoint)
    assert facts(tmp_path / "resumed") == ROLLED_BACK
    # A few weights have gradients of rounding errors alone, and Adam scales their steps to up to 1e-3.
    assert largest_difference(resumed, run("single", *TRAINED, *lora, "--steps", "4")) < 5e-5
    assert largest_difference(resumed, switched) > 1e-4  # training continues after the rollback


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "lora"), CASES)
def test_another_number_of_processes_rolls_back_unless_there_is_no_guard(
    strategy: str, lora: list[str], pretrained: str, tmp_path: Path
) -> None:
    options = ["--strategy", strategy, *TRAINED, *lora]
    rolled_back = train(tmp_path / "two", pretrained, *options, "--devices", "2", "--steps", "3")
    checkpoint = ["--steps", "3", "--resume", str(tmp_path / "two" / "last.ckpt")]
    resumed = train(tmp_path / "three", pretrained, *options, "--devices", "3", *checkpoint)
    assert facts(tmp_path / "three") == ROLLED_BACK
    assert largest_difference(resumed, rolled_back) == 0
    train(tmp_path / "unguarded", pretrained, *options, "--devices", "2", "--unguarded", *checkpoint)
    assert facts(tmp_path / "unguarded") == {"switched": 1, "returned": None, "solution": "differential"}
