"""Buckets of aspect ratios: pictures of about equal area, each batch of one shape."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_distill.data.epoch_sampler import EpochSampler


def aspect_buckets(height: int, width: int, multiple: int, largest_ratio: float) -> list[tuple[int, int]]:
    """Sizes (height, width) of about the area of one size, from flat to tall; that size is among them.

    Args:
        height: Pixels of the size whose area they share, a multiple of `multiple`.
        width: Likewise.
        multiple: Of which all heights and widths are multiples.
        largest_ratio: Largest ratio of the longer to the shorter side, at least 1; the given size stays in any case.
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
    """Place of the bucket whose aspect ratio is nearest to that of a picture, by the logarithm of the ratio."""
    ratio = math.log(height / width)
    return min(range(len(buckets)), key=lambda i: abs(math.log(buckets[i][0] / buckets[i][1]) - ratio))


class BucketSampler(EpochSampler):
    """Shuffles anew each epoch, in whole batches of one bucket each.

    Pictures that fill no batch of their bucket sit out the epoch, and so do batches that would not fall to every process.

    Args:
        dataset: What is sampled; only its length is used.
        buckets: Place of each sample's bucket (N,).
        batch_size: Samples a batch and process.
        seed: Seed of the orders.
        num_replicas: Number of processes.
        rank: Number of this process, from 0.
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
        self.batch_size = batch_size
        self.buckets = torch.as_tensor(buckets)
        batches = int((self.buckets.bincount() // batch_size).sum())
        self.num_samples = batches // num_replicas * batch_size
        self.total_size = self.num_samples * num_replicas

    def indices(self, epoch: int) -> list[int]:
        """The order of this process's samples in an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.buckets), generator=generator)
        batches = torch.cat(
            [
                members[: len(members) // self.batch_size * self.batch_size].view(-1, self.batch_size)
                for members in (order[self.buckets[order] == bucket] for bucket in self.buckets.unique())
            ]
        )
        batches = batches[torch.randperm(len(batches), generator=generator)]
        own: list[int] = batches[: self.total_size // self.batch_size][self.rank :: self.num_replicas].flatten().tolist()
        return own
