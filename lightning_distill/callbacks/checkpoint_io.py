"""Checkpoint files that are complete or do not exist, and that are verified when they are read."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer

from lightning_distill.outputs import atomic_file
from lightning_distill.sharding.checkpoint_files import local_path, read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary sibling, flushes it to disk, and renames it: a crash leaves the old checkpoint or the new one.

    Lightning writes to the temporary directory and moves the file. Between filesystems this move is not atomic. Reading
    verifies the file, and runs no code of it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save to a local file; Lightning handles other kinds of storage.

        Raises:
            StorageError: If the disk is full or fails; no part of the file is left.
        """
        target = local_path(path)
        if target is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_file(target) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Contents of a checkpoint on the CPU.

        Raises:
            ConfigurationError: If it is damaged, no checkpoint, or holds other objects than tensors and plain values.
        """
        return read_checkpoint(path)


def verify_reads(trainer: Trainer) -> None:
    """Replace Lightning's default `TorchCheckpointIO`, but not the user's own or that of a sharded strategy."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
