"""Checkpoints that are either whole or not there."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException


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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place of Lightning's own writer; a writer that the user chose stays, and so do sharded strategies."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save on SIGTERM, which Lightning raises between two steps, when the state is consistent."""
        if isinstance(exception, SIGTERMException) and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        else:
            super().on_exception(trainer, pl_module, exception)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself reaches the disk
    finally:
        os.close(descriptor)
