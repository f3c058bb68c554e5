"""Context of a training run: the lock of its directory, and the removal of what a run without a step has written."""

import os
from collections.abc import Sequence
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import IO

from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_distill.commands.run_directory import CHOSEN, Output, chosen_directory, is_remote, output_directories
from lightning_distill.commands.run_lock import SETTING, lock_directory, unlock_directory
from lightning_distill.errors import StorageError
from lightning_distill.outputs import check_directory

_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK")


class RunDirectory:
    """Context of `fit`: checks that its outputs can be written, and locks its directory against other runs.

    If the run ends before its first step, by an error or because it has no step, the context removes the files of its loggers
    and the directories that it has created. Files of others stay.

    Args:
        trainer: Settings of the trainer; `choose_directory` has set their `default_root_dir`.

    Attributes:
        path: The directory.
        config_file: File for the settings of this start: `config.yaml`, or `config-2.yaml` and so on in a continued run.
    """

    def __init__(self, trainer: Namespace) -> None:
        self.path = Path(trainer.default_root_dir)
        self._is_remote = is_remote(trainer.default_root_dir)
        self.config_file = next(
            file for n in count(1) if not (file := self.path / ("config.yaml" if n == 1 else f"config-{n}.yaml")).exists()
        )
        self._outputs = output_directories(trainer)
        self._lock: IO[str] | None = None
        self._earlier: dict[Path, set[str]] = {}
        self._absent: set[Path] = set()

    def __enter__(self) -> "RunDirectory":
        """Check the outputs and lock the directory.

        Raises:
            ConfigurationError: If an output cannot be written, or another run uses the directory.
        """
        if self._is_remote or chosen_directory() is not None:
            return self
        for setting, path in [Output(SETTING, self.path), *self._outputs]:
            check_directory(path, setting)
        if any(int(os.environ.get(name) or 0) for name in _RANKS):
            return self
        self._record(self.path)
        self._lock = lock_directory(self.path)
        os.environ[CHOSEN] = f"{os.getpid()}:{self.path}"
        return self

    def record_loggers(self, loggers: Sequence[Logger]) -> None:
        """Record which files the directories of loggers have before the run."""
        for logger in loggers:
            if self._lock is not None and isinstance(logger, TensorBoardLogger | CSVLogger) and not is_remote(logger.log_dir):
                self._record(Path(logger.log_dir))

    def _record(self, directory: Path) -> None:
        self._earlier.setdefault(directory, set(os.listdir(directory)) if directory.is_dir() else set())
        self._absent.update(path for path in (directory, *directory.parents) if not path.exists())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Release the lock, and remove what a run without a step has written.

        Raises:
            StorageError: If the directory was removed, and the run ends because a file was not found.
        """
        if self._lock is None:
            return
        os.environ.pop(CHOSEN, None)
        started = self.config_file.exists()
        if not unlock_directory(self.path, self._lock):
            if isinstance(error, FileNotFoundError):
                raise StorageError(
                    f"{SETTING} {str(self.path)!r} was removed while the run was writing to it; start the run again"
                ) from error
            if error is None:
                rank_zero_warn(f"{SETTING} {str(self.path)!r} was removed during the run; it has only what was written later")
        elif not started:
            self._remove_files()

    def _remove_files(self) -> None:
        own = f"events.out.tfevents.*.{os.getpid()}.*", "hparams.yaml", "metrics.csv"
        for directory, earlier in self._earlier.items():
            for path in directory.iterdir() if directory.is_dir() else ():
                if path.name not in earlier and any(fnmatch(path.name, pattern) for pattern in own):
                    path.unlink()
        for directory in sorted(self._absent, key=lambda path: len(path.parts), reverse=True):
            if directory.is_dir() and not any(directory.iterdir()):
                directory.rmdir()
