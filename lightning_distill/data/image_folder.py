"""LightningDataModule of captioned images from a directory."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_distill.data.epoch_sampler import SampleIndex
from lightning_distill.data.folder_captions import CaptionedImage, read_captions
from lightning_distill.data.folder_files import comparable, find_files
from lightning_distill.data.image_files import MAX_PIXELS, ImageDecodeError, UnreadableImageError, read_image
from lightning_distill.data.resumable import BatchDataset, ResumableData
from lightning_distill.errors import ConfigurationError
from lightning_distill.paths import expand_path


class ImageFolderDataset(Dataset[dict[str, Any]]):
    """Captions, with or without images, loaded one batch at a time.

    Args:
        directory: Directory of the image files.
        samples: Image files and their captions.
        size: Output size (height, width) in pixels; None loads no images.
        seed: Seed of the choice among several captions of an image.
        max_pixels: Largest number of pixels to decode.
    """

    def __init__(
        self,
        directory: Path,
        samples: Sequence[CaptionedImage],
        size: tuple[int, int] | None,
        seed: int = 0,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.directory = directory
        self.samples = list(samples)
        self.size = size
        self.seed = seed
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Load a batch of one sample."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """Load a batch. `DataLoader` calls this once per batch, instead of `__getitem__` once per sample.

        The caption of an image with several is chosen anew in each epoch of training, by (seed, epoch, file name); without an
        epoch, it is the first.

        Returns:
            `prompt`, list of B captions; `index` (B,), int64; and `image` (B, 3, height, width), float in [-1, 1], if `size`
            is not None.

        Raises:
            UnreadableImageError: If an image cannot be decoded.
        """
        samples = [self.samples[i] for i in indices]
        batch: dict[str, Any] = {
            "prompt": [self._caption(sample, index) for sample, index in zip(samples, indices, strict=True)],
            "index": torch.tensor(indices, dtype=torch.int64),
        }
        if self.size is not None:
            batch["image"] = torch.stack([self._image(sample, *self.size) for sample in samples])
        return batch

    def _caption(self, sample: CaptionedImage, index: int) -> str:
        if len(sample.captions) == 1 or not isinstance(index, SampleIndex):
            return sample.captions[0]
        return random.Random(f"{self.seed} {index.epoch} {sample.file_name!r}").choice(sample.captions)

    def _image(self, sample: CaptionedImage, height: int, width: int) -> Tensor:
        path = self.directory / sample.file_name
        try:
            return read_image(path, height, width, self.max_pixels)
        except ImageDecodeError as error:
            raise UnreadableImageError(
                f"{path}, named in {sample.place}, cannot be decoded as an image ({error}); replace the file or remove its "
                "caption"
            ) from error


class ImageFolder(ResumableData):
    """Captioned images from a directory in the `imagefolder` layout of Hugging Face.

    The directory contains a `metadata.jsonl` with a line `{"file_name": "0001.jpg", "text": "a caption"}` per image, or the
    same table as `metadata.csv`, `.tsv`, `.json` or `.parquet`. File names are relative to the directory. A caption may be a
    list of captions; each epoch of training chooses one, by (`seed`, epoch, file name). Without a table, the caption of
    `0001.jpg` is the text of `0001.txt` beside it, also in sub-directories. Blank captions are skipped, with a warning.

    All files are looked for before the first step. Images are resized to cover height x width with the aspect ratio unchanged,
    then center-cropped. Transparent pixels become white. The sample order of an epoch depends only on (`seed`, epoch). A run
    resumed mid-epoch therefore sees the same samples as an uninterrupted run.

    Validation, test and prediction use the images of `validation_directory`. Without one, they use a share of `directory`, and
    training excludes that share. Hashes of the file names select the share, so it does not depend on `seed` or on the line
    order. All captions of an image are in the same split.

    Args:
        directory: Directory of the training images.
        validation_directory: Directory of the validation images, in the same layout; None uses a share of `directory`.
        validation_share: Share of the images of `directory` for validation, above 0 and below 1; ignored if
            `validation_directory` is set.
        caption_column: Column of the captions in the table; None takes "text", "caption" or "prompt".
        height: Output height of images in pixels.
        width: Output width of images in pixels.
        max_pixels: Largest number of pixels to decode of an image; a JPEG file, unless progressive, counts as its decoder
            reduces it. A worker needs up to 16 bytes per pixel for WebP, 4 to 9 for other formats.
        batch_size: Samples per batch and process.
        seed: Seed of the training order, and of the choice among captions.
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
        caption_column: str | None = None,
        height: int = 512,
        width: int = 512,
        max_pixels: int = MAX_PIXELS,
        batch_size: int = 1,
        seed: int = 0,
        num_workers: int = 4,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        for name, value in (("height", height), ("width", width), ("max_pixels", max_pixels)):
            if value < 1:
                raise ConfigurationError(f"data.{name} is {value}; set it to 1 or more pixels")
        if not 0 < validation_share < 1:
            raise ConfigurationError(f"data.validation_share is {validation_share}; set it above 0 and below 1, 0.01 is usual")
        self.directory = Path(expand_path(directory, "data.directory"))
        self.validation_directory: Path | None = None
        if validation_directory is not None:
            self.validation_directory = Path(expand_path(validation_directory, "data.validation_directory"))
        self.validation_share = validation_share
        self.caption_column = caption_column
        self.max_pixels = max_pixels
        self.size = (height, width)
        self.save_hyperparameters(logger=False)  # the logger's table has the model's settings, and names may clash
        self._train: ImageFolderDataset | None = None
        self._validation: ImageFolderDataset | None = None

    @property
    def image_sizes(self) -> Mapping[str, Sequence[tuple[int, int]]]:
        """Size (height, width) of all images in pixels, by the names of its settings."""
        return {"data.height and data.width": [self.size]}

    def setup(self, stage: str | None = None) -> None:
        """Read the captions and look for the image files. Images are decoded when a batch is loaded.

        Raises:
            ConfigurationError: If a directory is missing, its captions are missing or invalid, image files are missing, or
                there are too few samples for one training batch per process.
        """
        if self._validation is None:
            if self.validation_directory is None:
                train, validation = split(self._read(self.directory, "data.directory", stage), self.validation_share)
                self._train = self._dataset(self.directory, train)
                self._validation = self._dataset(self.directory, validation)
            else:
                validation = self._read(self.validation_directory, "data.validation_directory", stage)
                self._validation = self._dataset(self.validation_directory, validation)
        if stage in ("fit", None):
            if self._train is None:
                self._train = self._dataset(self.directory, self._read(self.directory, "data.directory", stage))
            self.check_training_size(len(self._train))

    def splits(self) -> dict[str, BatchDataset]:
        """Datasets that `setup` created; outside of training, an image with several captions has its first."""
        splits = super().splits()
        several = sum(len(sample.captions) > 1 for sample in self.require_setup(self._train).samples)
        if several:
            rank_zero_warn(f"{several} images of data.directory have several captions: only the first of each is encoded")
        return splits

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches of the validation captions without images: `prompt` and `index`."""
        validation = self.require_setup(self._validation)
        return self.evaluation_loader(ImageFolderDataset(validation.directory, validation.samples, size=None))

    def _read(self, directory: Path, setting: str, stage: str | None) -> list[CaptionedImage]:
        samples = read_captions(directory, setting, self.caption_column)
        return find_files(directory, samples, setting, may_be_missing=stage == "predict")

    def _dataset(self, directory: Path, samples: Sequence[CaptionedImage]) -> ImageFolderDataset:
        return ImageFolderDataset(directory, samples, self.size, self.seed, self.max_pixels)


def split(samples: Sequence[CaptionedImage], share: float) -> tuple[list[CaptionedImage], list[CaptionedImage]]:
    """Split samples into training and validation samples, both in the given order; all captions of a file share a split.

    The validation split has the files with the smallest hashes of their names, at least one file. Few files change their split
    when files are added.
    """
    names = [comparable(sample.file_name) for sample in samples]  # missing files have names as written
    files = sorted(set(names), key=lambda name: hashlib.sha256(name.encode(errors="surrogatepass")).digest())
    chosen = set(files[: max(1, round(share * len(files)))])
    train = [sample for sample, name in zip(samples, names, strict=True) if name not in chosen]
    return train, [sample for sample, name in zip(samples, names, strict=True) if name in chosen]
