"""Pictures that `predict` draws, as files."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lightning_distill.errors import ConfigurationError


class WritePredictions(Callback):
    """Writes each picture that `predict` draws to a PNG named by its prompt's place in the data, with the prompt inside.

    Args:
        directory: Where to; None is `predictions` in the trainer's `default_root_dir`. It must hold no pictures yet.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a directory that holds pictures, before any is drawn.

        Raises:
            ConfigurationError: If it does.
        """
        if stage == "predict" and any(self._target(trainer).glob("*.png")):
            raise ConfigurationError(
                f"{self._target(trainer)} holds pictures already, among which those of this run would be lost; remove them, or "
                "set trainer.default_root_dir"
            )

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the pictures of a batch."""
        if not isinstance(outputs, Tensor) or outputs.ndim != 4:
            return
        target = self._target(trainer)
        target.mkdir(parents=True, exist_ok=True)
        pixels = outputs.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for place, prompt, picture in zip(batch["index"].tolist(), batch["prompt"], pixels, strict=True):
            info = PngInfo()
            info.add_itxt("prompt", prompt)
            Image.fromarray(picture).save(target / f"{place:06}.png", pnginfo=info)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where they are."""
        rank_zero_info(f"Wrote pictures to {self._target(trainer)}")

    def _target(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "predictions" if self.directory is None else Path(self.directory)
