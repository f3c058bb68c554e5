"""A progress bar with what matters in distillation."""

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from lightning_distill.methods.base import TeacherStudentBase


class DistillProgressBar(TQDMProgressBar):
    """Lightning's bar with short names and the phase: loss, solution in use, samples a second, latest validation.

    It is made with tqdm, which draws in step with training. The bar of rich draws from a thread, a hundred times a second,
    and takes that from training where cores are few.

    Args:
        refresh_rate: Batches between two updates; 0 is no bar. None is every batch in a terminal, and every 50 elsewhere,
            where each update is a line of a log.
        leave: Whether finished bars stay.
    """

    def __init__(self, refresh_rate: int | None = None, leave: bool = False) -> None:
        if refresh_rate is None:
            refresh_rate = 1 if sys.stdout.isatty() else 50
        super().__init__(refresh_rate=refresh_rate, leave=leave)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the bar shows after its speed: `train/loss` is `loss`, and so on."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        shown: dict[str, Any] = {"loss": metrics.pop("train/loss")} if "train/loss" in metrics else {}
        if isinstance(pl_module, TeacherStudentBase) and len(pl_module.phases) > 1:
            shown["phase"] = pl_module.phase
        return shown | {name.rsplit("/", 1)[-1]: value for name, value in metrics.items()}
