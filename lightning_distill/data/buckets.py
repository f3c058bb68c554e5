"""Aspect-ratio buckets: image sizes of about equal area, and batches with one size each."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_distill.data.epoch_sampler import EpochSampler, without


def aspect_buckets(height: int, width: int, multiple: int, largest_ratio: float) -> list[tuple[int, int]]:
    """Bucket sizes (height, width) of about equal area, sorted from wide to tall; `(height, width)` is one of them.

    Args:
        height: Height in pixels of the reference size, a multiple of `multiple`.
        width: Width in pixels of the reference size, a multiple of `multiple`.
        multiple: Divisor of all heights and widths.
        largest_ratio: Largest ratio of the longer to the shorter side, at least 1. The reference size is exempt.
    """
    area = height * width
    sizes = {(height, width)}
    for rows in range(1, math.isqrt(int(area * largest_ratio)) // multiple + 1):
        h = rows * multiple
        w = max(1, round(area / h / multiple)) * multiple
        if max(h, w) <= largest_ratio * min(h, w):
            sizes.add((h, w))
    return sorted(sizes, key=lambda size: size[0] / size[1])


def nearest_bucket(height: int, width: int, buckets: Sequence[tuple[int, int]]) -> int:
    """Index of the bucket with the nearest aspect ratio to an image; the distance is the difference of log ratios."""
    ratio = math.log(height / width)
    return min(range(len(buckets)), key=lambda i: abs(math.log(buckets[i][0] / buckets[i][1]) - ratio))


class BucketSampler(EpochSampler):
    """Shuffles every epoch into full batches; all samples of a batch share one bucket.

    An epoch skips the samples of incomplete batches. It also skips batches that cannot be divided equally among the processes.

    Args:
        dataset: Dataset to sample; the sampler uses only its length.
        buckets: Bucket index of each sample (N,).
        batch_size: Samples per batch and process.
        seed: Seed of the shuffles.
        num_replicas: Number of processes.
        rank: Rank of this process, from 0.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        buckets: Sequence[int],
        batch_size: int = 1,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(dataset, batch_size, seed, num_replicas, rank)
        self.buckets = torch.as_tensor(buckets)
        batches = int((self.buckets.bincount() // batch_size).sum())
        self.num_samples = batches // num_replicas * batch_size
        self.total_size = self.num_samples * num_replicas

    def signature(self) -> dict[str, Any]:
        """What the order depends on, besides the epoch, by its name for users."""
        return {**super().signature(), "samples of each bucket": self.buckets.bincount().tolist()}

    def global_order(self, epoch: int, batch_size: int, excluded: Tensor) -> Tensor:
        """Samples (n,) of an epoch in the order in which all processes together consume them, in full batches."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = without(torch.randperm(len(self.buckets), generator=generator), excluded)
        batches = torch.cat(
            [
                members[: len(members) // batch_size * batch_size].view(-1, batch_size)
                for members in (order[self.buckets[order] == bucket] for bucket in self.buckets.unique())
            ]
        )
        return batches[torch.randperm(len(batches), generator=generator)].flatten()

    def own_part(self, order: Tensor) -> Tensor:
        """The samples of this process in an order of full steps of all processes."""
        return order.view(-1, self.batch_size)[self.rank :: self.num_replicas].flatten()
