"""LightningDataModule of captioned images from a directory."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_distill.data.image_files import ImageDecodeError, UnreadableImageError, read_image
from lightning_distill.data.resumable import ResumableData
from lightning_distill.errors import ConfigurationError

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class CaptionedImage:
    """A line of the metadata.

    Attributes:
        file_name: Path of the image file, relative to the directory.
        text: Caption.
        line: Line number, from 1.
    """

    file_name: str
    text: str
    line: int


class ImageFolderDataset(Dataset[dict[str, Any]]):
    """Captions, with or without images, loaded one batch at a time.

    Args:
        directory: Directory of the image files and the metadata.
        samples: Lines of the metadata.
        size: Output size (height, width) in pixels; None loads no images.
    """

    def __init__(self, directory: Path, samples: Sequence[CaptionedImage], size: tuple[int, int] | None) -> None:
        self.directory = directory
        self.samples = list(samples)
        self.size = size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Load a batch of one sample."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """Load a batch. `DataLoader` calls this once per batch, instead of `__getitem__` once per sample.

        Returns:
            `prompt`, list of B captions; `index` (B,), int64; and `image` (B, 3, height, width), float in [-1, 1], if `size`
            is not None.

        Raises:
            UnreadableImageError: If an image is cannot be decoded.
        """
        samples = [self.samples[i] for i in indices]
        batch: dict[str, Any] = {
            "prompt": [sample.text for sample in samples],
            "index": torch.tensor(indices, dtype=torch.int64),
        }
        if self.size is not None:
            batch["image"] = torch.stack([self._image(sample, *self.size) for sample in samples])
        return batch

    def _image(self, sample: CaptionedImage, height: int, width: int) -> Tensor:
        path = self.directory / sample.file_name
        try:
            return read_image(path, height, width)
        except ImageDecodeError as error:
            raise UnreadableImageError(
                f"{path} of line {sample.line} of {self.directory / METADATA} cannot be decoded as an image ({error}); "
                "replace the file or remove the line"
            ) from error


class ImageFolder(ResumableData):
    """Captioned images from a directory in the `imagefolder` layout of Hugging Face.

    The directory contains a `metadata.jsonl` with a line `{"file_name": "0001.jpg", "text": "a caption"}` per image. File names
    are relative to the directory. Images are resized to cover height x width with the aspect ratio unchanged, then
    center-cropped. Transparent pixels become white. The sample order of an epoch depends only on (`seed`, epoch). A run resumed
    mid-epoch therefore sees the same samples as an uninterrupted run.

    Validation, test and prediction use the images of `validation_directory`. Without one, they use a share of `directory`, and
    training excludes that share. Hashes of the file names select the share, so it does not depend on `seed` or on the line
    order. All captions of an image are in the same split.

    Args:
        directory: Directory of the training images.
        validation_directory: Directory of the validation images, in the same layout; None uses a share of `directory`.
        validation_share: Share of the images of `directory` for validation, above 0 and below 1; ignored if
            `validation_directory` is set.
        height: Output height of images in pixels.
        width: Output width of images in pixels.
        batch_size: Samples per batch and process.
        seed: Seed of the training order.
        num_workers: Worker processes per `DataLoader`, which decode the images; 0 decodes them in the main process, between
            training steps.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    def __init__(
        self,
        directory: str,
        validation_directory: str | None = None,
        validation_share: float = 0.01,
        height: int = 512,
        width: int = 512,
        batch_size: int = 1,
        seed: int = 0,
        num_workers: int = 4,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        for name, value in (("height", height), ("width", width)):
            if value < 1:
                raise ConfigurationError(f"data.{name} is {value}; set it to 1 or more pixels")
        if not 0 < validation_share < 1:
            raise ConfigurationError(f"data.validation_share is {validation_share}; set it above 0 and below 1, 0.01 is usual")
        self.directory = Path(directory)
        self.validation_directory = None if validation_directory is None else Path(validation_directory)
        self.validation_share = validation_share
        self.size = (height, width)
        self.save_hyperparameters(logger=False)  # the logger's table has the model's settings, and names may clash
        self._train: ImageFolderDataset | None = None
        self._validation: ImageFolderDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the metadata. Images are decoded when a batch is loaded.

        Raises:
            ConfigurationError: If a directory is missing, its metadata is missing, invalid or empty, or there are too few
                samples for one training batch per process.
        """
        if self._validation is None:
            if self.validation_directory is None:
                train, validation = split(read_metadata(self.directory, "data.directory"), self.validation_share)
                self._validation = ImageFolderDataset(self.directory, validation, self.size)
                self._train = ImageFolderDataset(self.directory, train, self.size)
            else:
                validation = read_metadata(self.validation_directory, "data.validation_directory")
                self._validation = ImageFolderDataset(self.validation_directory, validation, self.size)
        if stage in ("fit", None):
            if self._train is None:
                self._train = ImageFolderDataset(self.directory, read_metadata(self.directory, "data.directory"), self.size)
            self.check_training_size(len(self._train))

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches of the validation captions without images: `prompt` and `index`."""
        validation = self.require_setup(self._validation)
        return self.evaluation_loader(ImageFolderDataset(validation.directory, validation.samples, size=None))


def read_metadata(directory: Path, setting: str) -> list[CaptionedImage]:
    """Parse the `metadata.jsonl` of a directory. Empty lines are skipped, and further keys are ignored.

    Args:
        directory: Directory of the metadata.
        setting: Name of the setting with the directory, for error messages.

    Raises:
        ConfigurationError: If the directory or the file is missing, a line is not a JSON object with both keys, or there are no
            lines.
    """
    if not directory.is_dir():
        raise ConfigurationError(
            f"{setting} is {str(directory)!r}, which is not a directory; give one with images and a {METADATA}"
        )
    path = directory / METADATA
    if not path.is_file():
        raise ConfigurationError(
            f"{setting} is {str(directory)!r}, which has no {METADATA}; write one with a line "
            '{"file_name": "0001.jpg", "text": "a caption"} for each image'
        )
    with path.open("rb") as file:
        samples = [_parse_line(text, path, number) for number, text in enumerate(file, start=1) if text.strip()]
    if not samples:
        raise ConfigurationError(f"{path} of {setting} is empty; write a line for each image")
    return samples


def _parse_line(text: bytes, path: Path, line: int) -> CaptionedImage:
    try:
        entry = json.loads(text)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ConfigurationError(f"line {line} of {path} is not a JSON object ({error}); correct or remove it") from error
    for key in ("file_name", "text"):
        if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
            raise ConfigurationError(f'line {line} of {path} has no string under "{key}"; correct or remove it')
    return CaptionedImage(entry["file_name"], entry["text"], line)


def split(samples: Sequence[CaptionedImage], share: float) -> tuple[list[CaptionedImage], list[CaptionedImage]]:
    """Split samples into training and validation samples, both in the given order; all captions of a file share a split.

    The validation split has the files with the smallest hashes of their names, at least one file. Few files change their split
    when files are added.
    """
    files = sorted({sample.file_name for sample in samples}, key=lambda name: hashlib.sha256(name.encode()).digest())
    validation = set(files[: max(1, round(share * len(files)))])
    train = [sample for sample in samples if sample.file_name not in validation]
    return train, [sample for sample in samples if sample.file_name in validation]
