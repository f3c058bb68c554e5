"""8-bit and fused AdamW under every strategy."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.sharding.zero3 import check_no_block_state
from tests.sharding.tiny_runs import SEVERAL_RUNS, largest_difference, train

pytestmark = SEVERAL_RUNS
slow = pytest.mark.slow
STRATEGIES = [("auto", "1"), pytest.param("ddp", "2", marks=slow), pytest.param("fsdp2", "2", marks=slow)]


@pytest.fixture(scope="module")
def plain(pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights after three steps of torch's AdamW in one process."""
    return train(tmp_path_factory.mktemp("plain") / "run", pretrained, "--precision", "bf16-mixed")


def mean_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return torch.cat([(first[name] - second[name]).abs().flatten() for name in first]).mean().item()


@pytest.mark.parametrize(("strategy", "devices"), STRATEGIES)
def test_8bit_adamw_trains_and_resumes_exactly(
    strategy: str, devices: str, pretrained: str, plain: dict[str, Tensor], tmp_path: Path, adamw_8bit: Any
) -> None:
    settings = ["--precision", "bf16-mixed", "--optimizer", "8bit", "--strategy", strategy, "--devices", devices]
    weights = train(tmp_path / "run", pretrained, *settings)
    assert "OptimState8bit" in json.loads((tmp_path / "run" / "facts.json").read_text())["states"]
    # Each of three steps changes a weight by up to 1e-3. Few differ much: those whose squared gradients are rounded to zero.
    assert 0 < mean_difference(plain, weights) < 3e-4
    resumed = train(tmp_path / "resumed", pretrained, *settings, "--resume", str(tmp_path / "run" / "last.ckpt"))
    assert largest_difference(weights, resumed) == 0
    if strategy == "fsdp2":
        options = [*settings[:-1], "1", "--resume", str(tmp_path / "run" / "last.ckpt")]
        with pytest.raises(AssertionError, match=r"saved by 2 processes, and block-wise states .* cannot be resharded to 1;"):
            train(tmp_path / "one", pretrained, *options)


@pytest.mark.parametrize(("strategy", "devices"), [*STRATEGIES, pytest.param("deepspeed_stage_3", "2", marks=slow)])
def test_fused_adamw_equals_adamw_and_resumes_exactly(
    strategy: str, devices: str, pretrained: str, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    """Steps include gradient clipping."""
    settings = ["--precision", "bf16-mixed", "--optimizer", "fused", "--strategy", strategy, "--devices", devices]
    weights = train(tmp_path / "run", pretrained, *settings)
    assert largest_difference(plain, weights) < (1e-5 if strategy == "auto" else 1e-3)
    resumed = train(tmp_path / "resumed", pretrained, *settings, "--resume", str(tmp_path / "run" / "last.ckpt"))
    assert largest_difference(weights, resumed) == 0


def test_zero3_rejects_block_wise_state(adamw_8bit: Any) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigurationError, match=r"AdamW8bit, whose state is block-wise.* set trainer.strategy to fsdp2"):
        check_no_block_state(adamw_8bit([weight]))
    check_no_block_state(torch.optim.AdamW([weight]))
