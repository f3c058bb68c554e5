"""Lock of a run's directory: one running `fit` at a time."""

import errno
import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import IO

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_distill.errors import ConfigurationError

LOCK = ".lock"
"""Name of the locked file. A killed run leaves it, without a lock."""
SETTING = "trainer.default_root_dir"


def lock_directory(directory: Path) -> IO[str]:
    """Create a directory and lock it until the returned file is closed, or the process ends.

    It is a POSIX lock: processes that this one forks do not inherit it, and network file systems support it. Disks without
    locks only cause a warning.

    Raises:
        ConfigurationError: If another process has locked the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                with file:
                    raise in_use_error(directory, _read(file)) from error
            rank_zero_warn(f"the disk of {SETTING} {str(directory)!r} has no locks; start no second run in this directory")
            return file
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # another process has removed it in between
    file.truncate(0)
    started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started": started}, file)
    file.flush()
    return file


def unlock_directory(directory: Path, file: IO[str]) -> bool:
    """Release the lock of a directory.

    Args:
        directory: The directory.
        file: Result of `lock_directory`.

    Returns:
        Whether the directory still had the locked file. If not, it was removed, and may be another one by now.
    """
    path = directory / LOCK
    with file:
        is_there = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        if is_there:
            path.unlink()
    return is_there


def user_of(directory: Path) -> str | None:
    """Process, host and start of the run that has locked a directory; None if there is none."""
    try:
        with (directory / LOCK).open() as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return _read(file) if error.errno in (errno.EACCES, errno.EAGAIN) else None
    except FileNotFoundError:
        pass
    return None


def _read(file: IO[str]) -> str:
    file.seek(0)
    try:
        run = json.loads(file.read())
        return f"process {run['pid']} on {run['host']} since {run['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # which has not written the file yet


def in_use_error(directory: Path, user: str) -> ConfigurationError:
    """Error of a run into a locked directory.

    Args:
        directory: The directory.
        user: Result of `user_of`.
    """
    return ConfigurationError(
        f"{SETTING} is {str(directory)!r}, which a running fit uses ({user}); wait for its end, or set {SETTING} to another "
        "directory"
    )
