"""A sampler whose order depends only on (seed, epoch, rank), so that a resumed run sees the same samples."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler


class EpochSampler(DistributedSampler[int]):
    """Shuffles every epoch into full batches; its iterators save and restore their position for `StatefulDataLoader`.

    It extends `DistributedSampler` even for a single process. Lightning then calls `set_epoch` and does not replace the sampler
    with one that cannot resume. Every process gets the same number of batches; an epoch skips the remaining samples.

    Args:
        dataset: Dataset to sample; the sampler uses only its length.
        batch_size: Samples per batch and process.
        seed: Seed of the shuffles.
        num_replicas: Number of processes.
        rank: Rank of this process, from 0.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int = 1, seed: int = 0, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed, drop_last=True)
        samples: int = len(dataset)  # type: ignore[arg-type]
        self.num_samples = samples // (num_replicas * batch_size) * batch_size
        self.total_size = self.num_samples * num_replicas

    def indices(self, epoch: int) -> list[int]:
        """Sample indices of this process in an epoch, in order."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(len(self.dataset), generator=generator).tolist()  # type: ignore[arg-type]
        return order[self.rank : self.total_size : self.num_replicas]

    def __iter__(self) -> Iterator[int]:
        return _EpochIterator(self)


class _EpochIterator(Iterator[int]):
    """Reads the epoch at the first sample, because Lightning creates the first iterator before it calls `set_epoch`."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler
        self.epoch: int | None = None
        self.yielded = 0
        self.order: list[int] = []

    def __next__(self) -> int:
        if self.epoch is None:
            self._start(self.sampler.epoch)
        if self.yielded == len(self.order):
            raise StopIteration
        self.yielded += 1
        return self.order[self.yielded - 1]

    def _start(self, epoch: int) -> None:
        self.epoch = epoch
        self.order = self.sampler.indices(epoch)

    def state_dict(self) -> dict[str, int | None]:
        return {"epoch": self.epoch, "yielded": self.yielded}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        epoch, yielded = state["epoch"], state["yielded"] or 0
        if epoch is None:
            return
        if yielded == len(self.sampler):  # saved after the last batch: Lightning resumes with the next epoch
            epoch, yielded = epoch + 1, 0
        self._start(epoch)
        self.yielded = yielded
