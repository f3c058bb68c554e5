"""Optimizers that a config may name, under every strategy: 8 bits of state, and fused steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.sharding.zero3 import _refuse_blocks
from tests.sharding.test_sharded import largest_difference, train
from tests.tiny import save_tiny_pipeline

slow = pytest.mark.slow
STRATEGIES = [("auto", "1"), pytest.param("ddp", "2", marks=slow), pytest.param("fsdp2", "2", marks=slow)]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return save_tiny_pipeline(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def plain(pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """After three steps of torch's own AdamW, in one process."""
    return train(tmp_path_factory.mktemp("plain") / "run", pretrained, "--precision", "bf16-mixed")


def mean_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return torch.cat([(first[name] - second[name]).abs().flatten() for name in first]).mean().item()


@pytest.mark.parametrize(("strategy", "devices"), STRATEGIES)
def test_eight_bits_of_state_train_and_resume_exactly(
    strategy: str,
    devices: str,
    pretrained: str,
    plain: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    adamw_8bit: Any,
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiled, a step of each shape takes longer than the whole test
    settings = ["--precision", "bf16-mixed", "--optimizer", "8bit", "--strategy", strategy, "--devices", devices]
    whole = train(tmp_path / "whole", pretrained, *settings)
    assert "OptimState8bit" in json.loads((tmp_path / "whole" / "facts.json").read_text())["states"]
    # Three steps of 1e-3 a weight, of which few differ much: those whose squared gradients are rounded to nothing.
    assert 0 < mean_difference(plain, whole) < 3e-4
    resumed = train(tmp_path / "resumed", pretrained, *settings, "--resume", str(tmp_path / "whole" / "last.ckpt"))
    assert largest_difference(whole, resumed) == 0
    if strategy == "fsdp2":
        alone = [*settings[:-1], "1", "--resume", str(tmp_path / "whole" / "last.ckpt")]
        with pytest.raises(AssertionError, match="was saved by 2 processes, and its optimizer kept blocks"):
            train(tmp_path / "alone", pretrained, *alone)


@pytest.mark.parametrize(("strategy", "devices"), [*STRATEGIES, pytest.param("deepspeed_stage_3", "2", marks=slow)])
def test_fused_steps_equal_others(
    strategy: str, devices: str, pretrained: str, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    """Gradients are clipped as well."""
    settings = ["--precision", "bf16-mixed", "--optimizer", "fused", "--strategy", strategy, "--devices", devices]
    whole = train(tmp_path / "whole", pretrained, *settings)
    assert largest_difference(plain, whole) < (1e-5 if strategy == "auto" else 1e-3)
    resumed = train(tmp_path / "resumed", pretrained, *settings, "--resume", str(tmp_path / "whole" / "last.ckpt"))
    assert largest_difference(whole, resumed) == 0


def test_zero3_refuses_state_in_blocks(adamw_8bit: Any) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigurationError, match=r"AdamW8bit, whose state is in blocks .* choose trainer.strategy fsdp2"):
        _refuse_blocks(adamw_8bit([weight]))
    _refuse_blocks(torch.optim.AdamW([weight]))
