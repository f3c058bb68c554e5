"""The logged norm of the gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from lightning_distill.methods import MeanFlow
from tests.methods.gaussian_adapter import GaussianAdapter
from tests.methods.gaussian_runs import VALIDATION, loader, trainer


class Norms(Callback):
    """Norms of the student's gradients at each step, and those that validations see."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.validations: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in pl_module.student.parameters() if p.grad is not None]
        self.steps.append(torch.nn.utils.get_total_norm(gradients).item())

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validations.append(trainer.callback_metrics["train/grad_norm"].item())


@pytest.mark.parametrize("clip", [None, 0.01])
def test_the_norm_is_that_of_the_logged_step_before_clipping(tmp_path: Path, clip: float | None) -> None:
    norms, logger = Norms(), CSVLogger(tmp_path)
    settings = {"max_steps": 6, "log_every_n_steps": 2, "val_check_interval": 3, "num_sanity_val_steps": 0}
    run = trainer(tmp_path, logger=logger, callbacks=[norms], gradient_clip_val=clip, **settings)
    run.fit(MeanFlow(GaussianAdapter("small"), validation=VALIDATION), loader(), loader())
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    step, norm = (rows[0].split(",").index(name) for name in ("step", "train/grad_norm"))
    logged = {int(row.split(",")[step]): float(row.split(",")[norm]) for row in rows[1:] if row.split(",")[norm]}
    assert list(logged) == [1, 3, 5]
    assert all(logged[index] == pytest.approx(norms.steps[index]) for index in logged)
    assert norms.validations == pytest.approx([norms.steps[2], norms.steps[5]])
