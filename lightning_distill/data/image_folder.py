"""Captioned pictures from a directory as a LightningDataModule."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_distill.data.resumable import ResumableData
from lightning_distill.errors import ConfigurationError

METADATA = "metadata.jsonl"
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""All that PIL raises of a file that it cannot read."""
_DEEP = ("I", "F")  # modes of more than 8 bits, which PIL's conversion to RGB would clip


class UnreadableImageError(ConfigurationError):
    """A picture that cannot be read; the message names its file and its line of the metadata."""

    def __init__(self, message: str) -> None:
        # From a loader's worker process an error arrives as the text of its traceback, which ends with the message.
        super().__init__(message.rstrip().rsplit(f"{type(self).__name__}: ", 1)[-1])


@dataclass(frozen=True)
class CaptionedImage:
    """A line of the metadata.

    Attributes:
        file_name: The picture's file, seen from the directory.
        text: Its caption.
        line: Number of the line, from 1.
    """

    file_name: str
    text: str
    line: int


class ImageFolderDataset(Dataset[dict[str, Any]]):
    """Captions with, or without, their pictures, fetched a batch at a time.

    Args:
        directory: Where the files and the metadata are.
        samples: Lines of its metadata.
        size: (height, width) in pixels of what comes out; None leaves the pictures unread.
    """

    def __init__(self, directory: Path, samples: Sequence[CaptionedImage], size: tuple[int, int] | None) -> None:
        self.directory = directory
        self.samples = list(samples)
        self.size = size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A batch of one sample."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """A whole batch: the loader calls this once a batch in place of `__getitem__` once a sample.

        Returns:
            `prompt`, list of B captions; `index` (B,), int64; and `image` (B, 3, height, width), float in [-1, 1], if a size
            is given.

        Raises:
            UnreadableImageError: If a picture is missing, broken or of an unknown format.
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
        except UNREADABLE as error:
            reason = " ".join(str(error).split())
            raise UnreadableImageError(
                f"{path} of line {sample.line} of {self.directory / METADATA} cannot be read as a picture ({reason}); "
                "replace the file or remove the line"
            ) from error


class ImageFolder(ResumableData):
    """Pictures with captions from a directory in the layout of Hugging Face's `imagefolder`.

    The directory holds a `metadata.jsonl` with a line `{"file_name": "0001.jpg", "text": "a caption"}` for each picture, the
    file seen from the directory. A picture is resized until it covers height x width, keeping its proportions, and cropped
    at its center; transparent parts become white. The order of an epoch is a function of (`seed`, epoch) alone, so a run
    resumed in the middle of an epoch sees what the uninterrupted run would have seen.

    Validation, test and prediction use the pictures of `validation_directory`, or a share of `directory` that training then
    leaves out. That share is chosen by the file names: it does not depend on `seed` or on the order of the lines, and all
    captions of a picture are on the same side.

    Args:
        directory: Pictures to train on.
        validation_directory: Pictures to validate on, in the same layout; None takes `validation_share` of `directory`.
        validation_share: Share of the pictures of `directory`, above 0 and below 1; not used where there is a
            `validation_directory`.
        height: Height in pixels that pictures are brought to.
        width: Width in pixels that pictures are brought to.
        batch_size: Samples a batch and process.
        seed: Seed of the order of training.
        num_workers: Worker processes a loader, which read the pictures; 0 reads them between steps.

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
        self.save_hyperparameters(logger=False)  # the logger's table has the model's settings, which may share a name
        self._train: ImageFolderDataset | None = None
        self._validation: ImageFolderDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the metadata; pictures are read when they are asked for.

        Raises:
            ConfigurationError: If a directory, its metadata or what is in it is missing, or training has less than a batch.
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
            self.refuse_too_few(len(self._train))

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The validation captions without their pictures: batches of `prompt` and `index`."""
        validation = self.ready(self._validation)
        return self.evaluation_loader(ImageFolderDataset(validation.directory, validation.samples, size=None))


def read_image(source: Path | BinaryIO, height: int, width: int) -> Tensor:
    """A picture (3, height, width), float in [-1, 1], resized by antialiased bicubic filtering and cropped at its center.

    Raises:
        OSError: If the file is missing, broken or of an unknown format.
        ValueError: If it has more than 8 bits a channel.
    """
    with Image.open(source) as file:
        image: Image.Image = ImageOps.exif_transpose(file)
    if image.mode.startswith(_DEEP):
        raise ValueError("it has more than 8 bits a channel")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def upright_size(file: Image.Image) -> tuple[int, int]:
    """Height and width in pixels of a picture as it is shown, which a camera may have stored on its side; from its header."""
    width, height = file.size
    # A PNG would be read to its end to look for an orientation, which cameras do not put there.
    stored = file.format != "PNG" or "exif" in file.info
    on_its_side = stored and file.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (width, height) if on_its_side else (height, width)


def read_metadata(directory: Path, setting: str) -> list[CaptionedImage]:
    """The lines of a directory's `metadata.jsonl`; empty ones are skipped, further keys are ignored.

    Args:
        directory: Where it is.
        setting: Name of the setting that gives the directory, for errors.

    Raises:
        ConfigurationError: If there is no such file, a line is not an object with both keys, or there are no lines.
    """
    if not directory.is_dir():
        raise ConfigurationError(
            f"{setting} is {str(directory)!r}, which is not a directory; give one with pictures and their {METADATA}"
        )
    path = directory / METADATA
    if not path.is_file():
        raise ConfigurationError(
            f"{setting} is {str(directory)!r}, which holds no {METADATA}; write one with a line "
            '{"file_name": "0001.jpg", "text": "a caption"} for each picture'
        )
    with path.open("rb") as file:
        found = [_parsed(text, path, number) for number, text in enumerate(file, start=1) if text.strip()]
    if not found:
        raise ConfigurationError(f"{path} of {setting} is empty; write a line for each picture")
    return found


def _parsed(text: bytes, path: Path, line: int) -> CaptionedImage:
    try:
        entry = json.loads(text)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ConfigurationError(f"line {line} of {path} is not a JSON object ({error}); correct or remove it") from error
    for key in ("file_name", "text"):
        if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
            raise ConfigurationError(f'line {line} of {path} has no string under "{key}"; correct or remove it')
    return CaptionedImage(entry["file_name"], entry["text"], line)


def split(samples: Sequence[CaptionedImage], share: float) -> tuple[list[CaptionedImage], list[CaptionedImage]]:
    """Samples to train on and samples to validate on, each in their order; a file's captions stay together.

    The files with the smallest hashes of their names validate, at least one of them, so more files move few of the others.
    """
    files = sorted({sample.file_name for sample in samples}, key=lambda name: hashlib.sha256(name.encode()).digest())
    chosen = set(files[: max(1, round(share * len(files)))])
    train = [sample for sample in samples if sample.file_name not in chosen]
    return train, [sample for sample in samples if sample.file_name in chosen]
