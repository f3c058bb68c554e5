"""Batches of captioned images from any source; images that cannot be decoded are replaced."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch.utils.data import Dataset

from lightning_distill.data.epoch_sampler import SampleIndex
from lightning_distill.data.image_files import MAX_PIXELS, ImageDecodeError, read_image
from lightning_distill.data.tally import Tally

MAX_REPLACEMENTS = 16
"""Number of other samples that are tried in place of a broken one."""


class Source(Protocol):
    """Random access to captioned images."""

    skipped: Tally
    """Counts of the images and captions that are in no sample, by reason."""
    remarks: Tally
    """Counts of what is worth a warning but is not skipped."""

    def __len__(self) -> int: ...

    def location(self, index: int) -> str:
        """Location of a sample, for messages."""

    def captions(self, index: int) -> Sequence[str]:
        """Captions of a sample, at least one."""

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image in pixels."""

    def open_image(self, index: int) -> Path | BinaryIO:
        """Path or content of the image file of a sample."""


class ImageTextDataset(Dataset[dict[str, Any]]):
    """Captions and images, loaded one batch at a time. All images of a batch get the size of the first sample.

    Args:
        source: Source of the samples.
        source_indices: Indices of the samples within the source.
        sizes: Output size (height, width) in pixels of each sample.
        seed: Seed of the choice among several captions of an image.
        max_pixels: Largest number of pixels to decode.
        replace: Whether other samples of the same size take the place of samples that cannot be decoded.
    """

    def __init__(
        self,
        source: Source,
        source_indices: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        seed: int = 0,
        max_pixels: int = MAX_PIXELS,
        replace: bool = True,
    ) -> None:
        self.source = source
        self.source_indices = list(source_indices)
        self.sizes = list(sizes)
        self.seed = seed
        self.max_pixels = max_pixels
        self.replace = replace

    def __len__(self) -> int:
        return len(self.source_indices)

    def without_replacement(self) -> "ImageTextDataset":
        """The same samples, whose batches have no sample in place of a broken one."""
        return ImageTextDataset(self.source, self.source_indices, self.sizes, self.seed, self.max_pixels, replace=False)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Load a batch of one sample."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """Load a batch.

        The caption of an image with several is chosen anew in each epoch of training, by (seed, epoch, index); without an
        epoch, it is the first.

        Returns:
            `prompt`, list of B captions; `index` (B,), int64; `broken`, descriptions of the samples that cannot be decoded;
            and, unless there is no sample, `image` (B, 3, height, width), float in [-1, 1]. B is the number of indices, less
            the broken samples without a replacement.
        """
        decoded: list[int] = []
        images: list[torch.Tensor] = []
        broken: list[str] = []
        for index in indices:
            for candidate in (index, *(self._replacements(index) if self.replace else ())):
                if candidate != index and (candidate in indices or candidate in decoded):
                    continue
                source_index = self.source_indices[candidate]
                try:
                    image = read_image(self.source.open_image(source_index), *self.sizes[indices[0]], self.max_pixels)
                except (ImageDecodeError, OSError) as error:
                    broken.append(f"{self.source.location(source_index)} ({' '.join(str(error).split())})")
                else:
                    images.append(image)
                    decoded.append(candidate)
                    break
        batch: dict[str, Any] = {
            "prompt": [self._caption(index) for index in decoded],
            "index": torch.tensor(decoded, dtype=torch.int64),
            "broken": broken,
        }
        return {**batch, "image": torch.stack(images)} if images else batch

    def _caption(self, index: int) -> str:
        captions = self.source.captions(self.source_indices[index])
        if len(captions) == 1 or not isinstance(index, SampleIndex):
            return captions[0]
        return random.Random(f"{self.seed} {index.epoch} {self.source_indices[index]}").choice(captions)

    def _replacements(self, index: int) -> Iterator[int]:
        """Samples of the same size in an order that depends only on the index, so that a resumed run takes the same ones."""
        generator = random.Random(index)
        same_size = self._indices_by_size[self.sizes[index]]
        for _ in range(MAX_REPLACEMENTS):
            candidate = generator.choice(same_size)
            yield SampleIndex(candidate, index.epoch) if isinstance(index, SampleIndex) else candidate

    @cached_property
    def _indices_by_size(self) -> dict[tuple[int, int], list[int]]:
        found: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for index, size in enumerate(self.sizes):
            found[size].append(index)
        return dict(found)
