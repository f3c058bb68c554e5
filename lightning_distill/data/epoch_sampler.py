"""A sampler whose order depends only on (seed, epoch), and whose position does not depend on processes and batch size."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

Consumed = list[tuple[int, int]]
"""Samples of an epoch that all processes together have consumed: pairs of a batch size and the samples in such batches."""


class SampleIndex(int):
    """Index of a sample in an epoch of training.

    Attributes:
        epoch: The epoch, from 0.
    """

    epoch: int

    def __new__(cls, index: int, epoch: int) -> "SampleIndex":
        """Index with its epoch."""
        created = super().__new__(cls, index)
        created.epoch = epoch
        return created

    def __reduce__(self) -> tuple[type["SampleIndex"], tuple[int, int]]:
        """Pickle for the queue to a worker process."""
        return SampleIndex, (int(self), self.epoch)


class EpochSampler(DistributedSampler[int]):
    """Shuffles every epoch into full batches, and saves and restores its position within an epoch.

    All processes together consume one order of samples. The position counts them in this order. A run that is resumed with
    another number of processes or another batch size thus consumes the remaining samples of the epoch.

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
        self.batch_size = batch_size
        self.samples: int = len(dataset)  # type: ignore[arg-type]
        self.num_samples = self.samples // self.step_samples * batch_size
        self.total_size = self.num_samples * num_replicas
        self._restored: tuple[int, Consumed] | None = None
        self._current: tuple[int, Consumed] = (0, [])
        self._batches = 0

    @property
    def step_samples(self) -> int:
        """Samples that all processes together consume in one step."""
        return self.batch_size * self.num_replicas

    def indices(self, epoch: int) -> list[int]:
        """Sample indices of this process in an epoch, in order."""
        return self._own_part(self._remaining(epoch, []))

    def __iter__(self) -> Iterator[int]:
        """Sample indices of this process: the rest of a restored epoch once, then those of the epoch that was set."""
        self._current, self._restored = self._restored or (self.epoch, []), None
        own = self._own_part(self._remaining(*self._current))
        self._batches = len(own) // self.batch_size
        epoch = self._current[0]
        return (SampleIndex(index, epoch) for index in own)  # a dataset may vary a sample by the epoch

    def remaining_batches(self) -> int:
        """Batches of each process in the next iteration."""
        return len(self._remaining(*(self._restored or (self.epoch, [])))) // self.step_samples

    # Position

    def signature(self) -> dict[str, Any]:
        """What the order depends on, besides the epoch, by its name for users."""
        return {"samples": self.samples, "seed": self.seed}

    def state_dict(self, batches: int) -> dict[str, Any]:
        """Position, the same in all processes.

        Args:
            batches: Batches of each process since the start of the current iteration.
        """
        epoch, consumed = self._restored or self._current
        if self._restored is None and batches:
            if batches == self._batches:
                epoch, consumed = epoch + 1, []
            else:
                consumed = _added(consumed, self.batch_size, batches * self.step_samples)
        return {"epoch": epoch, "consumed": consumed, "processes": self.num_replicas, **self.signature()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position; the next iteration has the rest of its epoch.

        If the order is another one, because other data or another seed is configured, the position keeps its number of samples.
        After the last full step of an epoch the next epoch begins. A position of another kind of loader is ignored.
        """
        if "consumed" not in state:
            return
        epoch, consumed = state["epoch"], [(size, count) for size, count in state["consumed"]]
        if any(state.get(name) != value for name, value in self.signature().items()):
            count = sum(count for _, count in consumed)
            consumed = [(self.batch_size, count // self.batch_size * self.batch_size)]
        if len(self._remaining(epoch, consumed)) < self.step_samples:
            epoch, consumed = epoch + 1, []
        self._restored = (epoch, consumed)

    def skip_to_next_epoch(self) -> None:
        """Restore the start of the epoch after the restored one, unless the restored position is a start."""
        epoch, consumed = self._restored or self._current
        self._restored = (epoch + 1 if consumed else epoch, [])

    def global_order(self, epoch: int, batch_size: int, excluded: Tensor) -> Tensor:
        """Samples (n,) of an epoch in the order in which all processes together consume them.

        Args:
            epoch: The epoch.
            batch_size: Samples per batch.
            excluded: Indices (m,) of samples to leave out.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return without(torch.randperm(self.samples, generator=generator), excluded)

    def own_part(self, order: Tensor) -> Tensor:
        """The samples of this process in an order of full steps of all processes."""
        return order[self.rank :: self.num_replicas]

    def _own_part(self, order: Tensor) -> list[int]:
        own: list[int] = self.own_part(order[: len(order) // self.step_samples * self.step_samples]).tolist()
        return own

    def _remaining(self, epoch: int, consumed: Consumed) -> Tensor:
        """Global order of the samples that are not consumed."""
        earlier, count = consumed, 0
        if consumed and consumed[-1][0] == self.batch_size:  # the same batches, continued
            earlier, count = consumed[:-1], consumed[-1][1]
        excluded = torch.empty(0, dtype=torch.int64)
        for batch_size, samples in earlier:
            excluded = torch.cat([excluded, self.global_order(epoch, batch_size, excluded)[:samples]])
        return self.global_order(epoch, self.batch_size, excluded)[count:]


def without(order: Tensor, excluded: Tensor) -> Tensor:
    """The samples of an order that are not excluded."""
    return order[~torch.isin(order, excluded)] if len(excluded) else order


def _added(consumed: Sequence[tuple[int, int]], batch_size: int, samples: int) -> Consumed:
    if consumed and consumed[-1][0] == batch_size:
        return [*consumed[:-1], (batch_size, consumed[-1][1] + samples)]
    return [*consumed, (batch_size, samples)]
