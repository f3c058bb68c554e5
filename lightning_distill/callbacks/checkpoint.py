"""The last states of a training, kept as atomic checkpoints that hold finite weights."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_distill.callbacks.checkpoint_io import verify_reads
from lightning_distill.callbacks.non_finite import SavedState, check_weights, largest_weights
from lightning_distill.errors import ConfigurationError, StorageError
from lightning_distill.outputs import sync, unfinished_path
from lightning_distill.sharding.checkpoint_files import (
    LAST,
    local_path,
    newest_checkpoint,
    read_checkpoint,
    remove,
    remove_remains,
)


class AtomicCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` with atomic files, which keeps the last states, and saves the state in which a run ends.

    Each state is one file, or one directory of a sharded strategy, and `last.ckpt` is a link to the newest. `--ckpt_path last`
    resumes from the newest one that is undamaged and finite. Weights and optimizer states that are not finite end the run and
    are not saved. While a checkpoint is written, the disk holds `keep_last` + 1 states.

    The state is saved after the last step, at whatever interval the others are, and at a signal that ends the run.

    Resuming skips no validation. If validation is due at the step of a checkpoint, the checkpoint is saved after it. If a
    signal interrupts a validation or comes before it, the resumed run starts with this validation. Lightning skips both, and a
    callback that reads validation metrics would then decide later.

    Args:
        dirpath: Directory of the checkpoints; None is `checkpoints` in the logger's directory. Set it to resume with
            `--ckpt_path last`.
        filename: Name pattern of the checkpoints; None is `epoch=...-step=...`.
        save_last: Whether to keep the newest states, with `last.ckpt` as a link to the newest. Otherwise only those are kept
            that `save_top_k` and `monitor` select.
        keep_last: Number of newest states to keep, at least 1, beside those that `monitor` selects.
        **kwargs: Further arguments of `ModelCheckpoint`.

    Raises:
        ConfigurationError: If `keep_last` is below 1.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str | None = None,
        save_last: bool = True,
        keep_last: int = 2,
        **kwargs: Any,
    ) -> None:
        if keep_last < 1:
            raise ConfigurationError(f"AtomicCheckpoint.keep_last is {keep_last}; set it to at least 1 state")
        super().__init__(dirpath, filename, save_last=save_last, enable_version_counter=False, **kwargs)
        self.keep_last = keep_last
        self._states: list[SavedState] = []
        self._resumed: SavedState | None = None
        self._defers_saves = self._has_deferred_save = False
        self._validated_at: int | None = None
        self._validation_is_pending = False

    @property
    def saved_states(self) -> Sequence[SavedState]:
        """The checkpoints from which the run can be resumed: the one it was resumed from, and the last ones."""
        return self._states if self._resumed is None else [self._resumed, *self._states]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace Lightning's reader and writer of checkpoints."""
        super().setup(trainer, pl_module, stage)
        verify_reads(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what killed processes left in the directory, and record the checkpoint that the run was resumed from."""
        super().on_train_start(trainer, pl_module)
        directory = self._directory
        if trainer.is_global_zero and directory is not None and directory.is_dir() and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a helper of Trainer's constructor
            remove_remains(directory)
        if trainer.ckpt_path is not None:
            path = os.path.realpath(local_path(trainer.ckpt_path) or trainer.ckpt_path)
            self._resumed = SavedState(path, trainer.global_step, max(largest_weights(pl_module).values(), default=0.0))

    @property
    def _directory(self) -> Path | None:
        return local_path(self.dirpath) if self.dirpath else None

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """The checkpoint of `ckpt_path="last"`."""
        directory = self._directory or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
        if self.dirpath and self._directory is None:
            return super()._find_last_checkpoints(trainer)
        newest = newest_checkpoint(directory, verify_shards=trainer.is_global_zero)
        return set() if newest is None else {str(newest)}

    # When to save

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a checkpoint is due; if validation is due as well, defer the save until after validation."""
        self._defers_saves = _validation_is_due(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        is_mid_epoch = not trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        if is_mid_epoch and not self._defers_saves and _training_ends(trainer):
            self._save_final_state(trainer)
        self._defers_saves = False

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._has_deferred_save |= self._defers_saves
        if not self._defers_saves:
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._has_deferred_save |= self._defers_saves
        if self._defers_saves or not self.save_last or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a helper of Trainer's constructor
            return
        directory = self._directory
        if directory is None:  # on remote storage there are no links
            super()._save_last_checkpoint(trainer, monitor_candidates)
            return
        if self._last_global_step_saved != trainer.global_step or self._validation_is_pending:
            self._save_checkpoint(trainer, self.format_checkpoint_name(monitor_candidates))
        if self._last_checkpoint_saved:
            link = directory / LAST
            if trainer.is_global_zero:
                self._link_newest(link)
            self.last_model_path = str(link)
            self._remove_old_states(trainer)
        trainer.strategy.barrier()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the deferred checkpoint of this step, or a checkpoint that the monitored metric calls for."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validated_at = trainer.fit_loop.epoch_loop.total_batch_idx
        if self._has_deferred_save:
            self._has_deferred_save = False
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        else:
            super().on_validation_end(trainer, pl_module)
        if _training_ends(trainer):
            self._save_final_state(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a checkpoint that is due at the end of the epoch, and the state at the end of training."""
        super().on_train_epoch_end(trainer, pl_module)
        if _training_ends(trainer):
            self._save_final_state(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state if a hook after those of the callbacks has ended training."""
        self._save_final_state(trainer)

    def _save_final_state(self, trainer: Trainer) -> None:
        """Save the state of the last step, unless it is saved already."""
        has_no_step = self._resumed is not None and self._resumed.step == trainer.global_step
        if has_no_step or self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor is None:  # the best state is then the newest
            self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the loops in the state from which they continue as an uninterrupted run does.

        If training ends within an epoch, Lightning counts this epoch as complete. If validation is pending, the state is that
        before its first batch.
        """
        loop = checkpoint["loops"]["fit_loop"]
        epoch_loop = trainer.fit_loop.epoch_loop
        if epoch_loop.batch_progress.current.ready > 0 and not epoch_loop._num_ready_batches_reached():
            for counts in loop["epoch_progress"].values():
                counts["processed"] = counts["completed"] = min(counts["completed"], counts["started"] - 1)
        if trainer.validating and not epoch_loop._should_accumulate() and not _validation_is_due(trainer, at_stop=False):
            # Lightning validates as training stops, and counts the step of the loggers after that. A resumed run does not.
            loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
        if not self._validation_is_pending:
            return
        for counts in (loop["epoch_loop.batch_progress"]["total"], loop["epoch_loop.batch_progress"]["current"]):
            counts["completed"] = counts["processed"]
        # Lightning reads this as a validation that was interrupted in its first batch.
        for counts in (loop["epoch_loop.val_loop.batch_progress"][name] for name in ("total", "current")):
            counts |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save at a signal that ends the run, which is raised between two steps: the state is consistent there."""
        if isinstance(exception, SIGTERMException) and trainer.state.fn == "fit" and not trainer.sanity_checking:
            validated = self._validated_at == trainer.fit_loop.epoch_loop.total_batch_idx
            self._defers_saves = False
            self._validation_is_pending = trainer.validating or (_validation_is_due(trainer) and not validated)
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        else:
            super().on_exception(trainer, pl_module, exception)

    # What is kept

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Save one state, after a check that its weights are finite; all processes end if the first cannot write it."""
        module = trainer.lightning_module
        check_weights(trainer, module)
        largest = max(largest_weights(module).values(), default=0.0)
        before = self._states
        # Before saving: the list is part of the state.
        self._states = [*(each for each in before if each.path != filepath), SavedState(filepath, trainer.global_step, largest)]
        failure: StorageError | None = None
        try:
            super()._save_checkpoint(trainer, filepath)
        except StorageError as error:
            failure = error
            self._states = before
            trainer.strategy.barrier()  # the other processes wait here for the file
        message = trainer.strategy.broadcast(None if failure is None else str(failure))
        if message is not None:
            raise failure or StorageError(message)

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        kept = self._states[-self.keep_last :] if self.save_last else []
        return previous not in {state.path for state in kept} and super()._should_remove_checkpoint(trainer, previous, current)

    def _remove_old_states(self, trainer: Trainer) -> None:
        """Remove the states that are neither among the last nor selected by the monitored metric."""
        old, self._states = self._states[: -self.keep_last], self._states[-self.keep_last :]
        for path in (Path(state.path) for state in old):
            selected = self.save_top_k == -1 if self.monitor is None else str(path) in self.best_k_models
            if not selected and self._directory in path.parents:
                self._remove_checkpoint(trainer, str(path))

    def _link_newest(self, link: Path) -> None:
        """Let `last.ckpt` point to the newest state."""
        newest = Path(self._last_checkpoint_saved)
        if newest == link:
            return
        if link.exists() and not link.is_symlink():
            self._rename_copy(link)
        new = unfinished_path(link)
        remove(new)
        try:
            new.symlink_to(os.path.relpath(newest, link.parent))
        except OSError as error:
            rank_zero_warn(f"{link} cannot be a link on this file system ({error.strerror}); --ckpt_path last works without it")
            return
        os.replace(new, link)
        sync(link.parent)

    def _rename_copy(self, link: Path) -> None:
        """Give a `last.ckpt` that is no link, as in a copied directory, the name of its step."""
        try:
            content = read_checkpoint(link, mmap=True)
        except ConfigurationError as error:
            rank_zero_warn(f"{error}; it is now {link.name}.damaged")
            os.replace(link, link.with_name(f"{link.name}.damaged"))
            return
        step = int(content["global_step"])
        name = Path(self.format_checkpoint_name({"epoch": torch.tensor(content["epoch"]), "step": torch.tensor(step)}))
        if name.exists():
            remove(link)
            return
        os.replace(link, name)
        self._states.insert(0, SavedState(str(name), step, 0.0))

    def state_dict(self) -> dict[str, Any]:
        """State of `ModelCheckpoint`, and the last states."""
        states = [[state.path, state.step, state.largest] for state in self._states]
        return {**super().state_dict(), "last_states": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, if the directory is the same."""
        super().load_state_dict(state_dict)
        if self.dirpath == state_dict.get("dirpath"):
            self._states = [SavedState(*state) for state in state_dict.get("last_states", [])]


def _training_ends(trainer: Trainer) -> bool:
    """Whether the last step is done, by the limit of steps or epochs, or because a callback stops training."""
    loop = trainer.fit_loop
    steps, epochs = loop.max_steps, loop.max_epochs
    progress: Any = loop.epoch_progress.current
    if 0 <= steps <= trainer.global_step or (epochs is not None and 0 <= epochs <= progress.processed):
        return True
    return trainer.should_stop and loop._can_stop_early


def _validation_is_due(trainer: Trainer, at_stop: bool = True) -> bool:
    """Whether validation follows the last training batch.

    Args:
        trainer: The trainer.
        at_stop: Whether to include a validation that is due only because a callback stops training.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    stops = trainer.should_stop
    trainer.should_stop = stops and at_stop
    try:
        return fetcher is not None and loop._should_check_val_fx(fetcher) and not loop.val_loop.skip
    finally:
        trainer.should_stop = stops
