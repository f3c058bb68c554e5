"""Stop at a loss, gradient or weight that is not finite, before it reaches checkpoints or exports."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_distill.callbacks.non_finite import check_weights, explain, largest_weights
from lightning_distill.errors import NonFiniteError
from lightning_distill.sharding.protocols import StepAccounting


class StopOnNonFinite(Callback):
    """Raises `NonFiniteError` at the first loss or gradient that is NaN or infinite, before the optimizer step.

    At the end of training it checks the weights, their EMA and the optimizer states, before anything is exported. The message
    names the data sample or the network at fault, and the checkpoint to resume from.

    Under a gradient scaler (precision `16-mixed`) gradients are not checked: the scaler finds its scale by infinities. Where
    gradients are not accessible, as in DeepSpeed, it checks the number of steps that the strategy skipped.
    """

    def __init__(self) -> None:
        self._skipped = 0
        self._largest: dict[str, float] = {}
        self._batch: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the size of the weights, and the number of steps that were skipped before."""
        self._skipped = _skipped_steps(trainer)
        self._largest = largest_weights(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the batch."""
        self._batch = batch

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

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check that the strategy did not skip the step."""
        self._batch = None
        if trainer.precision != "16-mixed" and _skipped_steps(trainer) > self._skipped:
            raise _error(trainer, "gradient norm", math.inf)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the weights before they are exported."""
        check_weights(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Add the cause, the remedy and the checkpoint to resume from to the message."""
        if isinstance(exception, NonFiniteError):
            exception.args = (explain(exception, trainer, pl_module, self._largest, self._batch),)
        self._batch = None


def _skipped_steps(trainer: Trainer) -> int:
    return trainer.strategy.skipped_steps if isinstance(trainer.strategy, StepAccounting) else 0


def _error(trainer: Trainer, what: str, value: float) -> NonFiniteError:
    return NonFiniteError(f"the {what} became {value} at step {trainer.global_step}")
