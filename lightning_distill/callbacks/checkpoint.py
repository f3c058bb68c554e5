"""Checkpoints that are either whole or not there."""

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
    """Writes beside the target, flushes to the disk, then renames: a crash leaves the old checkpoint or the new one.

    Lightning writes to the temporary directory and moves, which tears across filesystems.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save to a local file; other kinds of storage are left to Lightning."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # The name is fixed, so that what a killed process leaves behind is overwritten by the next save.
        unfinished = target.with_name(f".{target.name}.unfinished")
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
        _sync_directory(target.parent)


class AtomicCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` with whole files only, which keeps a `last.ckpt` and saves it on SIGTERM as well.

    No validation is lost between a run and its resumption: where one is due at the step of a checkpoint, it comes first, and
    one that SIGTERM breaks off, or comes before, is done at the start of the resumed run. Lightning leaves both out, and a
    callback that decides by what validation finds would decide later.

    Args:
        dirpath: Directory of the checkpoints; None is `checkpoints` in the logger's directory. Set it to resume with
            `--ckpt_path last`.
        filename: Name pattern of the best checkpoints.
        save_last: Whether to keep the newest checkpoint as `last.ckpt`.
        enable_version_counter: Whether a second run into the same directory writes `last-v1.ckpt` beside `last.ckpt`
            instead of replacing it.
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
        self._holds = self._held = False
        self._validated_at: int | None = None
        self._lacks_validation = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place of Lightning's own writer; a writer that the user chose stays, and so do sharded strategies."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, or, where validation follows, after that."""
        self._holds = _validation_is_due(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._holds = False

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._held |= self._holds
        if not self._holds:
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._held |= self._holds
        if not self._holds:
            super()._save_last_checkpoint(trainer, monitor_candidates)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was to be saved at this step, or what validation has found worth it."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validated_at = trainer.fit_loop.epoch_loop.total_batch_idx
        if not self._held:
            super().on_validation_end(trainer, pl_module)
            return
        self._held = False
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Where validation was broken off or is still to come, leave the loops as before its first batch."""
        if not self._lacks_validation:
            return
        loop = checkpoint["loops"]["fit_loop"]
        for counts in (loop["epoch_loop.batch_progress"]["total"], loop["epoch_loop.batch_progress"]["current"]):
            counts["completed"] = counts["processed"]
        # To Lightning this is a validation that was broken off within its first batch.
        for counts in (loop["epoch_loop.val_loop.batch_progress"][name] for name in ("total", "current")):
            counts |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save on SIGTERM, which Lightning raises between two steps, when the state is consistent."""
        if isinstance(exception, SIGTERMException) and trainer.state.fn == "fit" and not trainer.sanity_checking:
            validated = self._validated_at == trainer.fit_loop.epoch_loop.total_batch_idx
            self._holds, self._lacks_validation = False, trainer.validating or (_validation_is_due(trainer) and not validated)
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        else:
            super().on_exception(trainer, pl_module, exception)


def _validation_is_due(trainer: Trainer) -> bool:
    """Whether validation follows the training batch that has just been."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    return fetcher is not None and loop._should_check_val_fx(fetcher) and not loop.val_loop.skip


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself reaches the disk
    finally:
        os.close(descriptor)
