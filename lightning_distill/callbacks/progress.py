"""Progress bar of distillation runs."""

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from lightning_distill.methods.base import TeacherStudentBase


class DistillProgressBar(TQDMProgressBar):
    """Lightning's tqdm bar with short metric names: loss, current phase, samples per second, latest validation.

    The bar of tqdm updates in the training thread. The bar of rich refreshes in a separate thread, a hundred times per second,
    and slows training down on few cores.

    Args:
        refresh_rate: Batches between two updates; 0 is no bar. None is every batch in a terminal, and every 50 batches
            elsewhere, where each update is a line of a log.
        leave: Whether finished bars stay on the screen.
    """

    def __init__(self, refresh_rate: int | None = None, leave: bool = False) -> None:
        if refresh_rate is None:
            refresh_rate = 1 if sys.stdout.isatty() else 50
        super().__init__(refresh_rate=refresh_rate, leave=leave)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Metrics after the speed, without their prefix: `train/loss` is `loss`."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        shown: dict[str, Any] = {"loss": metrics.pop("train/loss")} if "train/loss" in metrics else {}
        if isinstance(pl_module, TeacherStudentBase) and len(pl_module.phases) > 1:
            shown["phase"] = pl_module.phase
        return shown | {name.rsplit("/", 1)[-1]: value for name, value in metrics.items()}
