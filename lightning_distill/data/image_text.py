"""Large sets of captioned pictures, in tar files or data sets of Hugging Face, as a LightningDataModule."""

import glob
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset

from lightning_distill.data.buckets import aspect_buckets, nearest_bucket
from lightning_distill.data.hub_images import HubImages
from lightning_distill.data.image_folder import UNREADABLE, UnreadableImageError, read_image
from lightning_distill.data.resumable import ResumableData
from lightning_distill.data.tar_shards import TarShards
from lightning_distill.errors import ConfigurationError

ENOUGH = 1000
"""Samples from which on the share of broken ones is looked at."""


class Source(Protocol):
    """Where captioned pictures are."""

    unreadable: int
    """Pictures that were passed over, since not even their size could be read."""

    def __len__(self) -> int: ...

    def place(self, index: int) -> str:
        """Where a sample is, for messages."""

    def caption(self, index: int) -> str:
        """What a picture shows."""

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of a picture in pixels."""

    def picture(self, index: int) -> io.BytesIO:
        """The bytes of a picture."""


class ImageTextDataset(Dataset[dict[str, Any]]):
    """Captions and pictures, fetched a batch at a time, all of the size of the first one's bucket.

    Args:
        source: Where they are.
        places: Of the samples within the source.
        sizes: (height, width) in pixels that each is brought to.
    """

    def __init__(self, source: Source, places: Sequence[int], sizes: Sequence[tuple[int, int]]) -> None:
        self.source = source
        self.places = list(places)
        self.sizes = list(sizes)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A batch of one sample."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """A whole batch, without the samples whose pictures cannot be read.

        Returns:
            `prompt`, list of B captions; `index` (B,), int64; `broken`, descriptions of those left out; and, unless these are
            all, `image` (B, 3, height, width), float in [-1, 1].
        """
        kept, images, broken = [], [], []
        for index in indices:
            place = self.places[index]
            try:
                images.append(read_image(self.source.picture(place), *self.sizes[indices[0]]))
            except UNREADABLE as error:
                broken.append(f"{self.source.place(place)} ({' '.join(str(error).split())})")
            else:
                kept.append(index)
        batch: dict[str, Any] = {
            "prompt": [self.source.caption(self.places[index]) for index in kept],
            "index": torch.tensor(kept, dtype=torch.int64),
            "broken": broken,
        }
        return {**batch, "image": torch.stack(images)} if images else batch


class ImageText(ResumableData):
    """Pictures with captions from tar files in webdataset's layout, or a data set of Hugging Face, in buckets of aspect ratios.

    A picture is resized until it covers the size of its bucket, keeping its proportions, and cropped at its center; a batch is
    of one bucket. The order of an epoch is a function of (`seed`, epoch) alone, so a run resumed in the middle of an epoch sees
    what the uninterrupted run would have seen, with any number of workers. What lies where, and of which size, is read once,
    and kept in files beside the shards, or in the cache of `datasets`.

    A picture that cannot be read is left out of its batch, counted and told of; past `max_broken_share` of all the run ends.
    Captions are as they are in the data: dropping a share of them is a setting of the methods, `caption_dropout`, for all data.

    Validation, test and prediction use the first samples of `validation_source`, brought to height x width.

    Args:
        source: What to train on: tar files, a path with `*` and `?` for many; a hub id; a directory that `datasets` reads, of
            Parquet files or in the layout of `imagefolder`; or `.parquet` files, a path with `*` for many.
        validation_source: What to validate on, likewise; None takes the split `validation` of `source`, which tar files have
            not.
        validation_samples: Number of samples of those.
        image_column: Column of the pictures of a data set of Hugging Face.
        caption_column: Column of its captions; of tar files the key of the caption where it is `.json`.
        height: Pixels of the square, or other, size whose area all buckets have.
        width: Likewise.
        multiple: Of which all heights and widths of buckets are multiples: what the model's latents and patches need.
        largest_ratio: Largest ratio of sides of a bucket; 1 brings all pictures to height x width.
        min_side: Pixels of the shorter side below which pictures are left out; 0 takes all.
        max_broken_share: Share of the pictures that may be broken, in [0, 1).
        batch_size: Samples a batch and process.
        seed: Seed of the order of training.
        num_workers: Worker processes a loader, which read the pictures; 0 reads them between steps.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    def __init__(
        self,
        source: str,
        validation_source: str | None = None,
        validation_samples: int = 64,
        image_column: str = "image",
        caption_column: str = "caption",
        height: int = 512,
        width: int = 512,
        multiple: int = 16,
        largest_ratio: float = 2.0,
        min_side: int = 0,
        max_broken_share: float = 0.01,
        batch_size: int = 1,
        seed: int = 0,
        num_workers: int = 4,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        for name, value in (("height", height), ("width", width)):
            if value < 1 or multiple < 1 or value % multiple:
                raise ConfigurationError(f"data.{name} is {value}; set it to a multiple of data.multiple, {multiple}")
        if not largest_ratio >= 1:
            raise ConfigurationError(f"data.largest_ratio is {largest_ratio}; set it to 1 or more, 2 is usual")
        if not 0 <= max_broken_share < 1:
            raise ConfigurationError(f"data.max_broken_share is {max_broken_share}; choose a share in [0, 1), 0.01 is usual")
        if validation_samples < 1:
            raise ConfigurationError(f"data.validation_samples is {validation_samples}; set it to 1 or more")
        if min_side < 0:
            raise ConfigurationError(f"data.min_side is {min_side}; set it to 0 or more pixels")
        if source.endswith(".tar") and validation_source is None:
            raise ConfigurationError(
                "data.validation_source is null, and tar files have no split for it; give some of the shards"
            )
        self.source = source
        self.validation_source = validation_source
        self.validation_samples = validation_samples
        self.image_column = image_column
        self.caption_column = caption_column
        self.size = (height, width)
        self.buckets = aspect_buckets(height, width, multiple, largest_ratio)
        self.min_side = min_side
        self.max_broken_share = max_broken_share
        self.seen = self.broken = 0
        self.save_hyperparameters(logger=False)  # the logger's table has the model's settings, which may share a name
        self._train: ImageTextDataset | None = None
        self._train_buckets: list[int] = []
        self._validation: ImageTextDataset | None = None

    def open_source(self, train: bool) -> Source:
        """What to train on, or what to validate on.

        Raises:
            ConfigurationError: If there is nothing.
        """
        name, setting, split = self.source, "data.source", "train"
        if not train and self.validation_source is None:
            split = "validation"
        elif not train and self.validation_source is not None:
            name, setting = self.validation_source, "data.validation_source"
        if name.endswith(".tar"):
            return TarShards(find_shards(name, setting), self.caption_column)
        return HubImages(name, split, self.image_column, self.caption_column, setting)

    def prepare_data(self) -> None:
        """Look up what is there, in one process of a machine, unless that was done before."""
        for train in (True, False):
            self.open_source(train)

    def setup(self, stage: str | None = None) -> None:
        """Look up what is there; pictures are read when they are asked for.

        Raises:
            ConfigurationError: If there is nothing, or training has less than a batch.
        """
        if self._validation is None:
            source = self.open_source(train=False)
            places = list(range(min(self.validation_samples, len(source))))
            self._validation = ImageTextDataset(source, places, [self.size] * len(places))
        if stage in ("fit", None) and self._train is None:
            source = self.open_source(train=True)
            places = [i for i in range(len(source)) if min(source.size(i)) >= self.min_side]
            self._train_buckets = [nearest_bucket(*source.size(i), self.buckets) for i in places]
            self._train = ImageTextDataset(source, places, [self.buckets[bucket] for bucket in self._train_buckets])
            rank_zero_info(
                f"ImageText: {len(places)} pictures in {len(set(self._train_buckets))} buckets; left out are "
                f"{len(source) - len(places)} smaller than data.min_side and {source.unreadable} that cannot be read"
            )
            self.training_sampler(self._train)  # refuses what holds no batch

    @property
    def training_buckets(self) -> list[int]:
        """Bucket of each training sample."""
        return self._train_buckets

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Count the pictures that were left out of a batch.

        Raises:
            UnreadableImageError: If they are all of the batch, or have come to more than `max_broken_share` of all.
        """
        broken = batch.get("broken", [])
        batch = self.count_broken(batch)
        if not batch["prompt"]:
            raise UnreadableImageError(f"no picture of a batch can be read, the first being {broken[0]}; replace it")
        return batch

    def count_broken(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Count the pictures that were left out of a batch, and tell of them.

        Raises:
            UnreadableImageError: If they have come to more than `max_broken_share` of all.
        """
        broken = batch.pop("broken", [])
        self.seen += len(broken) + len(batch["prompt"])
        self.broken += len(broken)
        for description in broken:
            rank_zero_warn(f"ImageText leaves out {description}: {self.broken} of {self.seen} pictures so far")
        if self.seen >= ENOUGH and self.broken > self.max_broken_share * self.seen:
            raise UnreadableImageError(
                f"{self.broken} of {self.seen} pictures cannot be read, more than data.max_broken_share "
                f"{self.max_broken_share}; replace them, or raise it"
            )
        return batch

    def state_dict(self) -> dict[str, Any]:
        """How many pictures were broken so far."""
        return {"seen": self.seen, "broken": self.broken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seen, self.broken = state_dict["seen"], state_dict["broken"]


def find_shards(pattern: str, setting: str) -> list[Path]:
    """The files that a pattern stands for, in order.

    Raises:
        ConfigurationError: If it stands for none.
    """
    if not (files := sorted(Path(name) for name in glob.glob(pattern))):
        raise ConfigurationError(f"{setting} is {pattern!r}, which stands for no file; correct the path")
    return files
