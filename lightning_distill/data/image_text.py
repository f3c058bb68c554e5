"""Large sets of captioned pictures, in tar files, as a LightningDataModule."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_distill.data.buckets import BucketSampler, aspect_buckets, nearest_bucket
from lightning_distill.data.image_folder import UNREADABLE, UnreadableImageError, read_image
from lightning_distill.data.resumable import ResumableData
from lightning_distill.data.tar_shards import TarShards
from lightning_distill.errors import ConfigurationError

ENOUGH = 1000
"""Samples from which on the share of broken ones is looked at."""


class ImageTextDataset(Dataset[dict[str, Any]]):
    """Captions and pictures, fetched a batch at a time, all of the size of the first one's bucket.

    Args:
        shards: Where they are.
        places: Of the samples within the shards.
        sizes: (height, width) in pixels that each is brought to.
    """

    def __init__(self, shards: TarShards, places: Sequence[int], sizes: Sequence[tuple[int, int]]) -> None:
        self.shards = shards
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
            `prompt`, list of B captions; `image` (B, 3, height, width), float in [-1, 1]; `index` (B,), int64; and `broken`,
            descriptions of those left out.

        Raises:
            UnreadableImageError: If none can be read.
        """
        kept, images, broken = [], [], []
        for index in indices:
            place = self.places[index]
            try:
                images.append(read_image(self.shards.picture(place), *self.sizes[indices[0]]))
            except UNREADABLE as error:
                broken.append(f"{self.shards.place(place)} ({' '.join(str(error).split())})")
            else:
                kept.append(index)
        if not kept:
            raise UnreadableImageError(f"no picture of a batch can be read, the first being {broken[0]}; replace the shard")
        return {
            "prompt": [self.shards.caption(self.places[index]) for index in kept],
            "image": torch.stack(images),
            "index": torch.tensor(kept, dtype=torch.int64),
            "broken": broken,
        }


class ImageText(ResumableData):
    """Pictures with captions from tar files in webdataset's layout, in buckets of aspect ratios.

    A picture is resized until it covers the size of its bucket, keeping its proportions, and cropped at its center; a batch is
    of one bucket. The order of an epoch is a function of (`seed`, epoch) alone, so a run resumed in the middle of an epoch sees
    what the uninterrupted run would have seen, with any number of workers. What lies where in the shards is read once, and
    kept in files beside them.

    A picture that cannot be read is left out of its batch, counted and told of; past `max_broken_share` of all the run ends.

    Validation, test and prediction use the first samples of `validation_shards`, brought to height x width.

    Args:
        shards: Tar files to train on: a path, with `*` and `?` for many, or a list of such.
        validation_shards: Tar files to validate on, likewise.
        validation_samples: Number of samples of those.
        caption_key: Key of the caption where captions are `.json`; `.txt` is the caption itself.
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
        shards: str | list[str],
        validation_shards: str | list[str],
        validation_samples: int = 64,
        caption_key: str = "caption",
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
        self.shards = shards
        self.validation_shards = validation_shards
        self.validation_samples = validation_samples
        self.caption_key = caption_key
        self.size = (height, width)
        self.buckets = aspect_buckets(height, width, multiple, largest_ratio)
        self.min_side = min_side
        self.max_broken_share = max_broken_share
        self.seen = self.broken = 0
        self.save_hyperparameters(logger=False)  # the logger's table has the model's settings, which may share a name
        self._train: ImageTextDataset | None = None
        self._train_buckets: list[int] = []
        self._validation: ImageTextDataset | None = None

    def prepare_data(self) -> None:
        """Read the shards' headers, in one process of a machine, unless that was done before."""
        for pattern, setting in ((self.shards, "data.shards"), (self.validation_shards, "data.validation_shards")):
            TarShards(find_shards(pattern, setting), self.caption_key)

    def setup(self, stage: str | None = None) -> None:
        """Look up what is in the shards; pictures are read when they are asked for.

        Raises:
            ConfigurationError: If there are no shards or samples, or training has less than a batch.
        """
        if self._validation is None:
            shards = TarShards(find_shards(self.validation_shards, "data.validation_shards"), self.caption_key)
            places = list(range(min(self.validation_samples, len(shards))))
            self._validation = ImageTextDataset(shards, places, [self.size] * len(places))
        if stage in ("fit", None) and self._train is None:
            shards = TarShards(find_shards(self.shards, "data.shards"), self.caption_key)
            places = [i for i in range(len(shards)) if min(shards.size(i)) >= self.min_side]
            self._train_buckets = [nearest_bucket(*shards.size(i), self.buckets) for i in places]
            self._train = ImageTextDataset(shards, places, [self.buckets[bucket] for bucket in self._train_buckets])
            rank_zero_info(
                f"ImageText: {len(places)} pictures in {len(set(self._train_buckets))} buckets; left out are "
                f"{len(shards) - len(places)} smaller than data.min_side and {shards.unreadable} that cannot be read"
            )
            self.refuse_too_few(len(places))
            if len(self._sampler()) == 0:
                raise ConfigurationError(
                    f"no bucket holds a batch of data.batch_size {self.batch_size} for each process; lower batch_size or "
                    "largest_ratio, or give more samples"
                )

    def _sampler(self) -> BucketSampler:
        return BucketSampler(_ready(self._train), self._train_buckets, self.batch_size, self.seed, *self._replicas())

    def train_dataloader(self) -> StatefulDataLoader:
        """Shuffled batches of `prompt`, `image`, `index`, each of one bucket."""
        return self.resumable_loader(_ready(self._train), self._sampler())

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches of `prompt`, `image`, `index` in a fixed order."""
        return self.evaluation_loader(_ready(self._validation))

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The same as for validation."""
        return self.evaluation_loader(_ready(self._validation))

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The same as for validation."""
        return self.evaluation_loader(_ready(self._validation))

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Count the pictures that were left out of a batch.

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
                f"{self.max_broken_share}; replace the shards, or raise it"
            )
        return batch

    def state_dict(self) -> dict[str, Any]:
        """How many pictures were broken so far."""
        return {"seen": self.seen, "broken": self.broken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seen, self.broken = state_dict["seen"], state_dict["broken"]


def find_shards(patterns: str | Sequence[str], setting: str) -> list[Path]:
    """The files that one or several patterns stand for, in order.

    Raises:
        ConfigurationError: If a pattern stands for none.
    """
    found: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        files = sorted(Path(name) for name in glob.glob(pattern) if name.endswith(".tar"))
        if not files:
            raise ConfigurationError(f"{setting} has {pattern!r}, which stands for no .tar file; correct the path")
        found += files
    return list(dict.fromkeys(found))


def _ready(dataset: ImageTextDataset | None) -> ImageTextDataset:
    if dataset is None:
        raise RuntimeError("ImageText has not read its shards yet; call setup(stage) first")
    return dataset
