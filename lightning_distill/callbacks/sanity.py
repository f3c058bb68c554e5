"""A run that has broken down ends, before it overwrites what was good."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_distill.errors import NonFiniteError
from lightning_distill.sharding.protocols import StepAccounting


class StopOnNonFinite(Callback):
    """Stops at the first loss or gradient that is NaN or infinite, with the last good weights and checkpoints untouched.

    Under a gradient scaler (precision `16-mixed`) gradients are left alone: infinities are how the scaler finds its scale.
    Where gradients are out of sight, as in DeepSpeed, it goes by the steps that the strategy has left out.
    """

    def __init__(self) -> None:
        self._skipped = 0

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss; all processes stop together if one of them must."""
        broken = (~torch.isfinite(loss.detach())).any().float()
        if trainer.world_size > 1:
            broken = trainer.strategy.reduce(broken, reduce_op="sum")
        if broken:
            raise _error(trainer, "loss", float(loss.detach().float().mean()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check the norm of the gradients, which processes share after the backward pass."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded gradients
        if not torch.isfinite(norm):
            raise _error(trainer, "gradient norm", float(norm))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what was left out before."""
        self._skipped = _skipped_steps(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check that the step was not left out."""
        if trainer.precision != "16-mixed" and _skipped_steps(trainer) > self._skipped:
            raise _error(trainer, "gradient norm", math.inf)


def _skipped_steps(trainer: Trainer) -> int:
    return trainer.strategy.skipped_steps if isinstance(trainer.strategy, StepAccounting) else 0


def _error(trainer: Trainer, what: str, value: float) -> NonFiniteError:
    return NonFiniteError(
        f"the {what} became {value} at step {trainer.global_step}; the weights and checkpoints are as they were before it: "
        "lower the learning rate or set trainer.gradient_clip_val, and resume with --ckpt_path"
    )
