"""Optimizer settings, state and clipping for several kinds of optimizers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_distill.callbacks.optimizer_settings import _apply
from lightning_distill.callbacks.schedules import group_settings
from lightning_distill.commands.main import main
from lightning_distill.errors import ConfigurationError
from lightning_distill.optimizers import BLOCKS, allow_clipping, flatten_block_state, has_block_state, unflatten_block_state


def fused_optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], fused=True)


def test_clipping_is_allowed_for_fused_steps_without_gradient_scale() -> None:
    optimizer = fused_optimizer()
    assert optimizer._step_supports_amp_scaling
    allow_clipping(optimizer, scaled=True, clip=None)
    assert optimizer._step_supports_amp_scaling
    with pytest.raises(ConfigurationError, match=r"a fused AdamW, whose gradients trainer\.precision 16-mixed cannot clip"):
        allow_clipping(optimizer, scaled=True, clip=1.0)
    allow_clipping(optimizer, scaled=False, clip=1.0)
    assert not optimizer._step_supports_amp_scaling


def test_learning_rate_may_be_a_tensor() -> None:
    group = {"params": [], "lr": torch.tensor(0.5), "weight_decay": 0.1, "foreach": None}
    assert group_settings(group) == {"lr": 0.5, "weight_decay": 0.1}
    rate = group["lr"]
    assert _apply(group, {"lr": 0.25, "weight_decay": 0.1}) == ["lr 0.5 -> 0.25"]
    assert group["lr"] is rate
    assert rate == 0.25


def test_config_selects_an_optimizer_by_class_path(adamw_8bit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--model.optimizer=torchao.optim.AdamW8bit", "--model.optimizer.lr=0.5"]
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "flux_meanflow.yaml", *chosen, "--print_config"])
    assert end.value.code == 0
    optimizer = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "torchao.optim.AdamW8bit"
    assert optimizer["init_args"]["lr"] == 0.5


def test_torchao_optimizers_have_block_state(adamw_8bit: Any) -> None:
    assert has_block_state(adamw_8bit([torch.nn.Parameter(torch.zeros(2))]))
    assert not has_block_state(fused_optimizer())


def test_block_state_is_flattened_and_restored(adamw_8bit: Any, tmp_path: Path) -> None:
    weights = [torch.nn.Parameter(torch.randn(64, 64)), torch.nn.Parameter(torch.randn(3))]
    optimizer = adamw_8bit(weights)
    state = optimizer._new_buffer(weights[0], signed=True)
    state.copy_(torch.randn(64, 64))
    torch.save(flatten_block_state([{"state": {0: {"exp_avg": state, "step": torch.tensor(1.0)}}}]), tmp_path / "state.pt")
    # Lightning loads checkpoints with these arguments.
    read = torch.load(tmp_path / "state.pt", map_location=lambda storage, _: storage, weights_only=True)
    restored = unflatten_block_state(read)[0]["state"][0]
    assert type(restored["exp_avg"]) is type(state)
    assert torch.equal(restored["exp_avg"].dequantize(), state.dequantize())
    assert restored["step"] == 1
    read[0]["state"][0]["exp_avg"][BLOCKS] = "os.system"
    with pytest.raises(ConfigurationError, match=r"unknown class os\.system; set model\.optimizer"):
        unflatten_block_state(read)
