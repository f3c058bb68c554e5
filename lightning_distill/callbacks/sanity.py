"""Stop at a loss or gradient that is not finite, before it reaches weights or checkpoints."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_distill.errors import NonFiniteError
from lightning_distill.sharding.protocols import StepAccounting


class StopOnNonFinite(Callback):
    """Raises `NonFiniteError` at the first loss or gradient that is NaN or infinite; weights and checkpoints stay unchanged.

    Under a gradient scaler (precision `16-mixed`) gradients are not checked: the scaler finds its scale by infinities. Where
    gradients are not accessible, as in DeepSpeed, it checks the number of steps that the strategy skipped.
    """

    def __init__(self) -> None:
        self._skipped = 0

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss; all processes stop if the loss of one is not finite."""
        non_finite = (~torch.isfinite(loss.detach())).any().float()
        if trainer.world_size > 1:
            non_finite = trainer.strategy.reduce(non_finite, reduce_op="sum")
        if non_finite:
            raise _error(trainer, "loss", float(loss.detach().float().mean()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check the norm of the gradients, which are equal in all processes after the backward pass."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):
            raise _error(trainer, "gradient norm", float(norm))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the number of steps that were skipped before."""
        self._skipped = _skipped_steps(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check that the strategy did not skip the step."""
        if trainer.precision != "16-mixed" and _skipped_steps(trainer) > self._skipped:
            raise _error(trainer, "gradient norm", math.inf)


def _skipped_steps(trainer: Trainer) -> int:
    return trainer.strategy.skipped_steps if isinstance(trainer.strategy, StepAccounting) else 0


def _error(trainer: Trainer, what: str, value: float) -> NonFiniteError:
    return NonFiniteError(
        f"the {what} became {value} at step {trainer.global_step}; weights and checkpoints are those before this step: "
        "lower the learning rate or set trainer.gradient_clip_val, and resume with --ckpt_path"
    )
