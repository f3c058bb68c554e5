"""Atomic checkpoints: a file is either complete or does not exist."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary sibling, flushes it to disk, and renames it: a crash leaves the old checkpoint or the new one.

    Lightning writes to the temporary directory and moves the file. Between filesystems this move is not atomic.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save to a local file; Lightning handles other kinds of storage."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # The name is fixed, so that the next save overwrites the leftover of a killed process.
        unfinished = target.with_name(f".{target.name}.unfinished")
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
        _sync_directory(target.parent)


class AtomicCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` with atomic files, which also writes a `last.ckpt`, and saves it on SIGTERM.

    Resuming skips no validation. If validation is due at the step of a checkpoint, the checkpoint is saved after it. If
    SIGTERM interrupts a validation or comes before it, the resumed run starts with this validation. Lightning skips both, and a
    callback that reads validation metrics would then decide later.

    Args:
        dirpath: Directory of the checkpoints; None is `checkpoints` in the logger's directory. Set it to resume with
            `--ckpt_path last`.
        filename: Name pattern of the best checkpoints.
        save_last: Whether to save the newest checkpoint as `last.ckpt`.
        enable_version_counter: Whether a second run in the same directory writes `last-v1.ckpt` and does not replace
            `last.ckpt`.
        **kwargs: Further arguments of `ModelCheckpoint`.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str | None = None,
        save_last: bool = True,
        enable_version_counter: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dirpath, filename, save_last=save_last, enable_version_counter=enable_version_counter, **kwargs)
        self._defers_saves = self._has_deferred_save = False
        self._validated_at: int | None = None
        self._validation_is_pending = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace Lightning's default `TorchCheckpointIO`, but not the user's own or that of a sharded strategy."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a checkpoint is due; if validation is due as well, defer the save until after validation."""
        self._defers_saves = _validation_is_due(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._defers_saves = False

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._has_deferred_save |= self._defers_saves
        if not self._defers_saves:
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._has_deferred_save |= self._defers_saves
        if not self._defers_saves:
            super()._save_last_checkpoint(trainer, monitor_candidates)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the deferred checkpoint of this step, or a checkpoint that the monitored metric calls for."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validated_at = trainer.fit_loop.epoch_loop.total_batch_idx
        if not self._has_deferred_save:
            super().on_validation_end(trainer, pl_module)
            return
        self._has_deferred_save = False
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """If validation is pending, save the loops in their state before its first batch."""
        if not self._validation_is_pending:
            return
        loop = checkpoint["loops"]["fit_loop"]
        for counts in (loop["epoch_loop.batch_progress"]["total"], loop["epoch_loop.batch_progress"]["current"]):
            counts["completed"] = counts["processed"]
        # Lightning reads this as a validation that was interrupted in its first batch.
        for counts in (loop["epoch_loop.val_loop.batch_progress"][name] for name in ("total", "current")):
            counts |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save on SIGTERM, which Lightning raises between two steps: the state is consistent there."""
        if isinstance(exception, SIGTERMException) and trainer.state.fn == "fit" and not trainer.sanity_checking:
            validated = self._validated_at == trainer.fit_loop.epoch_loop.total_batch_idx
            self._defers_saves = False
            self._validation_is_pending = trainer.validating or (_validation_is_due(trainer) and not validated)
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        else:
            super().on_exception(trainer, pl_module, exception)


def _validation_is_due(trainer: Trainer) -> bool:
    """Whether validation follows the last training batch."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    return fetcher is not None and loop._should_check_val_fx(fetcher) and not loop.val_loop.skip


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # flushes the rename itself
    finally:
        os.close(descriptor)
