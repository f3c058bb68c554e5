"""A shuffle that is a function of (seed, epoch, rank), so that a resumed run sees the pictures it would have seen."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler


class EpochSampler(DistributedSampler[int]):
    """Shuffles anew each epoch, in whole batches; its iterators save and restore their place for `StatefulDataLoader`.

    It is a `DistributedSampler` even in a single process, because Lightning then calls `set_epoch` and never replaces it by
    one that cannot resume. Every process gets the same number of batches; what is left over sits out the epoch.

    Args:
        dataset: What is sampled; only its length is used.
        batch_size: Samples a batch and process.
        seed: Seed of the orders.
        num_replicas: Number of processes.
        rank: Number of this process, from 0.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int = 1, seed: int = 0, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed, drop_last=True)
        samples: int = len(dataset)  # type: ignore[arg-type]
        self.num_samples = samples // (num_replicas * batch_size) * batch_size
        self.total_size = self.num_samples * num_replicas

    def indices(self, epoch: int) -> list[int]:
        """The order of this process's samples in an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(len(self.dataset), generator=generator).tolist()  # type: ignore[arg-type]
        return order[self.rank : self.total_size : self.num_replicas]

    def __iter__(self) -> Iterator[int]:
        return _EpochIterator(self)


class _EpochIterator(Iterator[int]):
    """Chooses its epoch at the first sample, because Lightning makes the first iterator before it calls `set_epoch`."""

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
        if yielded == len(self.sampler):  # saved after the last batch: Lightning goes on with the next epoch
            epoch, yielded = epoch + 1, 0
        self._start(epoch)
        self.yielded = yielded
