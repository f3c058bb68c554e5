"""The checkpoint that `--ckpt_path` names: found and verified before a model loads."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_distill.errors import ConfigurationError
from lightning_distill.sharding.checkpoint_files import check_content, check_directory, local_path, read_checkpoint
from lightning_distill.sharding.protocols import Sharding


def find_checkpoint(path: str, trainer: Trainer, resumes: bool) -> str:
    """Path of the checkpoint that `last`, `hpc` or a path stands for; a URL of another machine stays as it is.

    Args:
        path: Value of the setting.
        trainer: Trainer with the directories to search.
        resumes: Whether training continues from it, and could start without it.

    Raises:
        ConfigurationError: If there is none.
    """
    if path == "best":
        raise ConfigurationError(
            "ckpt_path is 'best', which only the training process knows; set it to the file of the checkpoint"
        )
    if path == "last":
        return _last_checkpoint(trainer, resumes)
    if path == "hpc":
        found = trainer._checkpoint_connector._hpc_resume_path
        if found is None:
            raise ConfigurationError(
                f"ckpt_path is 'hpc', but trainer.default_root_dir {trainer.default_root_dir!r} has no hpc_ckpt_*.ckpt; "
                f"{_remedy(resumes)}"
            )
        return found
    check_exists(path, resumes)
    local = local_path(path)
    return path if local is None else str(local)


def check_exists(path: str, resumes: bool) -> None:
    """Check that a local checkpoint exists.

    Args:
        path: Path or URL of the checkpoint.
        resumes: Whether training continues from it, and could start without it.

    Raises:
        ConfigurationError: If not.
    """
    local = local_path(path)
    if local is not None and not local.exists():
        remedy = f"set it to an existing checkpoint{', or remove ckpt_path' if resumes else ''}"
        raise ConfigurationError(f"ckpt_path {path!r} does not exist; {remedy}")


def check_checkpoint(path: str, trainer: Trainer, resumes: bool) -> dict[str, Any] | None:
    """Contents of a checkpoint, verified; without the shards of a directory, which all processes verify together at loading.

    Args:
        path: Path of the checkpoint, or a URL.
        trainer: Trainer whose strategy loads it.
        resumes: Whether training continues from it, and not only its weights are used.

    Returns:
        The contents, whose tensors are read when they are used. None for a URL, which is verified at loading.

    Raises:
        ConfigurationError: If it is damaged, or another strategy saved it.
    """
    local = local_path(path)
    if local is None:
        return None
    if local.is_dir() and not isinstance(trainer.strategy, Sharding):
        raise ConfigurationError(
            f"ckpt_path {path!r} is a directory, as of a sharded strategy; set trainer.strategy to that strategy, or convert "
            "the checkpoint by `export`"
        )
    if local.is_dir():
        check_directory(local)
        return read_checkpoint(local)
    content = read_checkpoint(local, mmap=True)
    if isinstance(trainer.strategy, Sharding):
        raise ConfigurationError(
            f"ckpt_path {path!r} is not a checkpoint of a sharded strategy; resume it with the trainer.strategy that saved it"
        )
    check_content(content, path, resumes)
    return content


def _last_checkpoint(trainer: Trainer, resumes: bool) -> str:
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    found = [path for callback in callbacks for path in callback._find_last_checkpoints(trainer)]
    if not found:
        directories = ", ".join(str(callback.dirpath) for callback in callbacks if callback.dirpath) or "the new log directory"
        raise ConfigurationError(f"ckpt_path is 'last', but there is no last checkpoint in {directories}; {_remedy(resumes)}")
    return max(found, key=lambda path: Path(path).stat().st_mtime)


def _remedy(resumes: bool) -> str:
    """What to do without a checkpoint; only training starts without one."""
    if resumes:
        return "remove ckpt_path to start from the first step, or set it to the file of a checkpoint"
    return "set it to the file of a checkpoint, or trainer.default_root_dir to the directory of a run"
