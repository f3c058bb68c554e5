"""Training batches that resume mid-epoch, also with other processes, another batch size or other data."""

from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from lightning_distill.data.epoch_sampler import EpochSampler


class ResumableLoader(DataLoader[dict[str, Any]]):
    """Batches of an `EpochSampler`, whose position Lightning saves in checkpoints.

    The position is that of the last batch that the loader has returned, whatever its worker processes have prefetched. An
    iteration starts with its first batch: Lightning creates the first iterator before it sets the epoch.

    Args:
        dataset: Dataset of the samples.
        sampler: Sampler of the training order.
        on_restored: Called with the saved position after it was restored.
        **settings: Further arguments of `DataLoader`.
    """

    sampler: EpochSampler

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: EpochSampler,
        on_restored: Callable[["ResumableLoader", dict[str, Any]], None] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(dataset, batch_size=sampler.batch_size, sampler=sampler, drop_last=True, **settings)
        self.epoch_is_over = False
        self._on_restored = on_restored
        self._returned = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """The batches of an epoch, or none if Lightning has still to end the epoch of the checkpoint."""
        if self.epoch_is_over:
            self.epoch_is_over = False
            return iter(())
        return self._batches()

    def _batches(self) -> Iterator[dict[str, Any]]:
        self._returned = 0
        for batch in super().__iter__():
            self._returned += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Position in the order of the epoch."""
        return self.sampler.state_dict(self._returned)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position; the next iteration has the rest of its epoch."""
        self.sampler.load_state_dict(state)
        if not is_position(state):
            rank_zero_warn("the checkpoint has the position of another kind of data loader: an epoch of this data begins")
        elif self._on_restored is not None:
            self._on_restored(self, state)


def is_position(state: dict[str, Any]) -> bool:
    """Whether the state of a data loader is that of a `ResumableLoader`."""
    return "consumed" in state


def continue_epoch(trainer: Trainer, loader: ResumableLoader, state: dict[str, Any]) -> None:
    """Adapt the batch counts of a resumed epoch to the loader, and report samples that may repeat.

    Lightning counts the batches of an epoch, and ends it by their number. If another number of processes, another batch size or
    other data is configured, the number of an epoch's batches is another one.

    Args:
        trainer: Trainer whose loops were restored.
        loader: Loader whose position was restored.
        state: Position that the checkpoint has.
    """
    sampler = loader.sampler
    epochs: Any = trainer.fit_loop.epoch_progress
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    restored = sampler.state_dict(0)
    _report(state, restored, sampler)
    unfinished_hook = batches.total.processed - batches.total.completed  # 1 in a checkpoint of `on_train_batch_end`
    at_end = batches.is_last_batch or (not restored["consumed"] and batches.current.ready > 0)
    if not at_end:
        _set_count(batches.current, len(loader) - sampler.remaining_batches(), unfinished_hook)
        return
    sampler.skip_to_next_epoch()
    if epochs.current.processed >= sampler.state_dict(0)["epoch"]:  # saved after the end of the epoch: a new one begins
        for count in (epochs.total, epochs.current):
            count.completed = count.processed
        _set_count(batches.current, 0, 0)
        batches.is_last_batch = False
        return
    _set_count(batches.current, len(loader), unfinished_hook)
    batches.is_last_batch = True
    # Lightning ends the epoch. In a checkpoint of a batch's end it uses the iterator for the next epoch, otherwise another one.
    loader.epoch_is_over = not unfinished_hook


def _set_count(count: Any, value: int, unfinished_hook: int) -> None:
    count.ready = count.started = count.processed = value
    count.completed = value - unfinished_hook


def _report(state: dict[str, Any], restored: dict[str, Any], sampler: EpochSampler) -> None:
    consumed = sum(count for _, count in state["consumed"])
    if not consumed:
        return
    continued = sum(count for _, count in restored["consumed"])
    position = f"continues after {continued} of {sampler.samples} samples" if continued else "is over, and the next one begins"
    differing = [
        f"{value} {name} (checkpoint: {state.get(name, 'unset')})" if name == "samples" else f"other {name}"
        for name, value in sampler.signature().items()
        if state.get(name) != value
    ]
    if differing:
        rank_zero_warn(
            f"the training data has another order than in the checkpoint, {', '.join(differing)}: epoch {state['epoch']} "
            f"{position}; samples of this epoch may repeat, and others be left out"
        )
    elif state["processes"] != sampler.num_replicas or state["consumed"][-1][0] != sampler.batch_size:
        rank_zero_info(
            f"Data: epoch {state['epoch']} {position}, in batches of {sampler.batch_size} on {sampler.num_replicas} processes; "
            "no sample repeats"
        )
