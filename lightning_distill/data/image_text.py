"""LightningDataModule of large captioned image sets, from tar files or Hugging Face data sets."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_distill.data.buckets import aspect_buckets, nearest_bucket
from lightning_distill.data.hub_images import HubImages
from lightning_distill.data.image_files import MAX_PIXELS, UnreadableImageError
from lightning_distill.data.image_text_dataset import ImageTextDataset, Source
from lightning_distill.data.resumable import BatchDataset, ResumableData
from lightning_distill.data.source_paths import find_files, tar_patterns
from lightning_distill.data.tar_shards import TarShards
from lightning_distill.errors import ConfigurationError

MIN_SAMPLES_FOR_SHARE = 1000
"""Number of samples before the share of broken images is checked."""


class ImageText(ResumableData):
    """Captioned images in aspect-ratio buckets, from tar files in the webdataset layout or from a Hugging Face data set.

    Images are resized to cover the size of their bucket with the aspect ratio unchanged, then center-cropped. All images of a
    batch share one bucket. The sample order of an epoch depends only on (`seed`, epoch). A run resumed mid-epoch therefore sees
    the same samples as an uninterrupted run, with any number of workers. Image locations and sizes are read once. They are
    cached in files next to the tar shards, or in the cache of `datasets`.

    Images without a usable caption, captions without an image and images with damaged headers are counted at the start, in one
    line per source. Images that cannot be decoded are replaced by others of their bucket, counted and reported. The run stops
    if their share exceeds `max_broken_share`. Caption dropout is a setting of the methods, `caption_dropout`, for all data.

    Validation, test and prediction use the first samples of `validation_source`, resized to height x width.

    Args:
        source: Training data: `.tar` files, or a directory of them; a Hub id; a directory of Parquet files or in the
            `imagefolder` layout, for `datasets`; or `.parquet` files. Many files are a path with `*` or braces, as in
            `train-{00000..00099}.tar`, several of them separated by `::`, or a list.
        validation_source: Validation data, in any format of `source`. None uses the split `validation` of `source`, which
            tar files do not have.
        validation_samples: Number of validation samples.
        image_column: Image column of a Hugging Face data set.
        caption_column: Caption column of a Hugging Face data set; for tar files, key of the caption in `.json` files, which
            then win over `.txt` files. None takes `.txt` files, or the first column or key of `text`, `caption` and `prompt`.
            Of a list of captions, each epoch of training chooses one.
        height: Height in pixels of the reference size; all buckets have about its area.
        width: Width in pixels of the reference size; all buckets have about its area.
        multiple: Divisor of all bucket heights and widths, as required by the model's latents and patches.
        largest_ratio: Largest ratio of the longer to the shorter side of a bucket; 1 resizes all images to height x width.
        min_side: Smallest accepted shorter side of an image in pixels; 0 accepts all images.
        max_pixels: Largest number of pixels of an image that is decoded.
        max_broken_share: Largest accepted share of broken images, in [0, 1).
        batch_size: Samples per batch and process.
        seed: Seed of the training order, and of the choice among captions.
        num_workers: Worker processes per `DataLoader`, which decode the images; 0 decodes them in the main process, between
            training steps.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    def __init__(
        self,
        source: str | list[str],
        validation_source: str | list[str] | None = None,
        validation_samples: int = 64,
        image_column: str = "image",
        caption_column: str | None = None,
        height: int = 512,
        width: int = 512,
        multiple: int = 16,
        largest_ratio: float = 2.0,
        min_side: int = 0,
        max_pixels: int = MAX_PIXELS,
        max_broken_share: float = 0.01,
        batch_size: int = 1,
        seed: int = 0,
        num_workers: int = 4,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        if multiple < 1:
            raise ConfigurationError(f"data.multiple is {multiple}; set it to at least 1 pixel")
        for name, value in (("height", height), ("width", width)):
            if value < 1 or value % multiple:
                raise ConfigurationError(f"data.{name} is {value}; set it to a multiple of data.multiple, {multiple}")
        if not largest_ratio >= 1:
            raise ConfigurationError(f"data.largest_ratio is {largest_ratio}; set it to 1 or more, 2 is usual")
        if not 0 <= max_broken_share < 1:
            raise ConfigurationError(f"data.max_broken_share is {max_broken_share}; choose a share in [0, 1), 0.01 is usual")
        if validation_samples < 1:
            raise ConfigurationError(f"data.validation_samples is {validation_samples}; set it to 1 or more")
        if min_side < 0:
            raise ConfigurationError(f"data.min_side is {min_side}; set it to 0 or more pixels")
        if max_pixels < 1:
            raise ConfigurationError(f"data.max_pixels is {max_pixels}; set it to 1 or more, {MAX_PIXELS} is the default")
        if validation_source is None and tar_patterns(source, "data.source"):
            raise ConfigurationError(
                "data.validation_source is null, but tar files have no validation split; set it to some of the tar files"
            )
        self.source = source
        self.validation_source = validation_source
        self.validation_samples = validation_samples
        self.image_column = image_column
        self.caption_column = caption_column
        self.size = (height, width)
        self.buckets = aspect_buckets(height, width, multiple, largest_ratio)
        self.min_side = min_side
        self.max_pixels = max_pixels
        self.max_broken_share = max_broken_share
        self.seen = self.broken = 0
        self.save_hyperparameters(logger=False)  # the logger's table has the model's settings, and names may clash
        self._train: ImageTextDataset | None = None
        self._train_buckets: list[int] = []
        self._validation: ImageTextDataset | None = None
        self._sources: dict[bool, Source] = {}

    def open_source(self, train: bool) -> Source:
        """Open the training or the validation source.

        Raises:
            ConfigurationError: If the source cannot be loaded or has no samples.
        """
        if train not in self._sources:
            self._sources[train] = self._open_source(train)
        return self._sources[train]

    def _open_source(self, train: bool) -> Source:
        source, setting, split = self.source, "data.source", "train"
        if not train and self.validation_source is None:
            split = "validation"
        elif not train and self.validation_source is not None:
            source, setting = self.validation_source, "data.validation_source"
        opened: Source
        if patterns := tar_patterns(source, setting):
            opened = TarShards(find_files(patterns, setting), self.caption_column)
        else:
            opened = HubImages(source, split, self.image_column, self.caption_column, setting)
        for verb, tally in (("skips", opened.skipped), ("notes", opened.remarks)):
            if tally:
                rank_zero_warn(f"ImageText {verb} in {setting} {source!r}: {tally}")
        return opened

    def prepare_data(self) -> None:
        """Index the sources in one process per machine, unless they are already indexed."""
        for train in (True, False):
            self.open_source(train)

    @property
    def image_sizes(self) -> Mapping[str, Sequence[tuple[int, int]]]:
        """Sizes (height, width) of all buckets in pixels, by the names of their settings."""
        return {"data.height, data.width and data.multiple": self.buckets}

    def setup(self, stage: str | None = None) -> None:
        """Read the indices of the sources. Images are decoded when a batch is loaded.

        Raises:
            ConfigurationError: If a source cannot be loaded or has no samples, or there are too few samples for one training
                batch per process.
        """
        if self._validation is None:
            source = self.open_source(train=False)
            indices = list(range(min(self.validation_samples, len(source))))
            self._validation = ImageTextDataset(source, indices, [self.size] * len(indices), max_pixels=self.max_pixels)
        if stage in ("fit", None) and self._train is None:
            source = self.open_source(train=True)
            indices = [i for i in range(len(source)) if min(source.size(i)) >= self.min_side]
            self._train_buckets = [nearest_bucket(*source.size(i), self.buckets) for i in indices]
            sizes = [self.buckets[bucket] for bucket in self._train_buckets]
            self._train = ImageTextDataset(source, indices, sizes, self.seed, self.max_pixels)
            counts = Counter(self._train_buckets)
            rank_zero_info(
                f"ImageText: {len(indices)} images in {len(counts)} buckets; skipped {len(source) - len(indices)} smaller than "
                "data.min_side"
            )
            self.training_sampler(self._train)  # raises if there is no full batch
            if unused := sum(count for count in counts.values() if count < self.batch_size):
                rank_zero_warn(
                    f"ImageText never trains on {unused} images, in buckets of fewer than data.batch_size {self.batch_size} "
                    "images; lower data.batch_size or data.largest_ratio to train on them"
                )

    def splits(self) -> dict[str, BatchDataset]:
        """Datasets whose batches have no sample in place of a broken one, and the first of several captions."""
        train, validation = self.require_setup(self._train), self.require_setup(self._validation)
        several = sum(len(train.source.captions(index)) > 1 for index in train.source_indices)
        if several:
            rank_zero_warn(f"{several} images of data.source have several captions: only the first of each is encoded")
        return {"train": train.without_replacement(), "validation": validation.without_replacement()}

    @property
    def training_buckets(self) -> list[int]:
        """Bucket of each training sample."""
        return self._train_buckets

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Count the broken images of a batch.

        Raises:
            UnreadableImageError: If all images of the batch are broken, or the total share of broken images exceeds
                `max_broken_share`.
        """
        broken = batch.get("broken", [])
        batch = self.count_broken(batch)
        if not batch["prompt"]:
            raise UnreadableImageError(f"no image of a batch can be decoded, first {broken[0]}; replace the images")
        return batch

    def count_broken(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Count the broken images of a batch, and log a warning for each.

        Raises:
            UnreadableImageError: If the total share of broken images exceeds `max_broken_share`.
        """
        broken = batch.pop("broken", [])
        self.seen += len(broken) + len(batch["prompt"])
        self.broken += len(broken)
        for description in broken:  # in every process, since each has other images
            warnings.warn(f"ImageText skips {description}: {self.broken} of {self.seen} images so far", stacklevel=2)
        if self.seen >= MIN_SAMPLES_FOR_SHARE and self.broken > self.max_broken_share * self.seen:
            raise UnreadableImageError(
                f"{self.broken} of {self.seen} images cannot be decoded, more than data.max_broken_share "
                f"{self.max_broken_share}; replace the images, or raise data.max_broken_share"
            )
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Counts of all and of broken images so far."""
        return {"seen": self.seen, "broken": self.broken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        self.seen, self.broken = state_dict["seen"], state_dict["broken"]
