"""A LightningModule for tests, with the random number generators of Python, NumPy and torch in its training step."""

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn


class ToyModule(LightningModule):
    """Regression from images to random targets.

    Args:
        lr: Learning rate.
        width: Size of the hidden layer.
        losses: File to which each training step appends its number, its loss and the batch's indices, or None.
        break_at: Step with a NaN loss, or None.
        pause: Seconds of sleep after each step.
        decay: Factor of the learning rate per step, or None for a constant rate.
    """

    def __init__(
        self,
        lr: float = 0.01,
        width: int = 8,
        losses: str | None = None,
        break_at: int | None = None,
        pause: float = 0.0,
        decay: float | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.losses = losses
        self.break_at = break_at
        self.pause = pause
        self.decay = decay
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, width), nn.Dropout(0.5), nn.Linear(width, 1))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        target = torch.randn(1) + random.random() + float(np.random.rand())
        loss = (self.network(batch["image"]) - target.to(self.device)).square().mean()
        if self.global_step == self.break_at:
            loss = loss * float("nan")
        if self.losses:
            line = {"step": self.global_step, "loss": loss.item(), "index": batch["index"].tolist(), "rank": self.global_rank}
            with Path(self.losses).open("a") as file:
                file.write(json.dumps(line) + "\n")
        time.sleep(self.pause)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        torch.rand(batch_idx + 1)
        random.random()
        self.log("val/loss", self.network(batch["image"]).square().mean())

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("test/loss", self.network(batch["image"]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        if self.decay is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ManualToyModule(ToyModule):
    """A `ToyModule` with manual optimization."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def read_losses(path: Path | str) -> list[tuple[int, float, list[int]]]:
    """Step, loss and indices of each line of the file of a `ToyModule`."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [(line["step"], line["loss"], line["index"]) for line in lines]
