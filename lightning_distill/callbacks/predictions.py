"""Image files of `predict`."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.outputs import atomic_file, check_directory
from lightning_distill.paths import expand_path


class WritePredictions(Callback):
    """Writes each image of `predict` as a PNG file, named by the index of its prompt, with the prompt as PNG text.

    Args:
        directory: Target directory without PNG files; None is `predictions` in the trainer's `default_root_dir`.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory and expand_path(directory, "WritePredictions.directory")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before sampling that files can be written, and that none would be overwritten.

        Raises:
            ConfigurationError: If the directory cannot be written, or has PNG files.
        """
        if stage != "predict":
            return
        check_directory(self._target(trainer), "WritePredictions.directory")
        if any(self._target(trainer).glob("*.png")):
            raise ConfigurationError(
                f"the directory of predictions {str(self._target(trainer))!r} already has PNG files; remove them, or set "
                "trainer.default_root_dir to another directory"
            )

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the images of a batch."""
        if not isinstance(outputs, Tensor) or outputs.ndim != 4:
            return
        target = self._target(trainer)
        pixels = outputs.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for index, prompt, image in zip(batch["index"].tolist(), batch["prompt"], pixels, strict=True):
            info = PngInfo()
            info.add_itxt("prompt", prompt)
            with atomic_file(target / f"{index:06}.png") as file:
                Image.fromarray(image).save(file, format="png", pnginfo=info)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the directory of the images."""
        rank_zero_info(f"Wrote images to {self._target(trainer)}")

    def _target(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "predictions" if self.directory is None else Path(self.directory)
