"""Outputs: a check that a path can be written, before anything loads, and one-line errors for full disks."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lightning_distill.errors import ConfigurationError, StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FAILED = {errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE, errno.ENODEV}
_TEXT_OF_FULL = re.compile(r"No space left on device|Disk quota exceeded")
_TEXT_OF_CODE = re.compile(r"I/O error: (.*) \(os error (\d+)\)")  # safetensors raises an error without an errno
_PREFIX = ".probe-"
_PROBE = bytes(4096)  # a full disk may still accept empty files


def check_directory(path: str | Path, setting: str) -> None:
    """Check that files can be written to a directory, which need not exist; the check leaves nothing behind.

    Args:
        path: The directory; URLs of remote storage are not checked.
        setting: Name of the setting, for the error message.

    Raises:
        ConfigurationError: If the directory cannot be created, or no file can be written to it.
    """
    if "://" not in str(path) and (reason := _obstacle(Path(path).expanduser())):
        raise ConfigurationError(
            f"{setting} is {str(path)!r}, which cannot be written ({reason}); set it to a writable directory"
        )


def directory_contents(directory: Path) -> list[Path]:
    """Files and folders in a directory, without the probes of other processes that check it at the same time."""
    return [path for path in directory.iterdir() if not path.name.startswith(_PREFIX)]


def check_file(path: str | Path, setting: str) -> None:
    """Check that a file can be written, whose directory need not exist; the check leaves nothing behind.

    Args:
        path: The file.
        setting: Name of the setting, for the error message.

    Raises:
        ConfigurationError: If the path is a directory, or no file can be written to its directory.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise ConfigurationError(f"{setting} is {str(path)!r}, which is a directory; set it to the name of a file")
    if reason := _obstacle(file.parent):
        raise ConfigurationError(
            f"{setting} is {str(path)!r}, which cannot be written ({reason}); set it to a file in a writable directory"
        )


def _obstacle(directory: Path) -> str | None:
    """Why no file can be written to a directory, or None."""
    try:
        existing = next(parent for parent in (directory, *directory.absolute().parents) if os.path.lexists(parent))
        if not existing.is_dir():
            return f"{str(existing)!r} is not a directory"
        # In a directory of its own, because directories may be refused where files are accepted.
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=existing) as probe:
            (Path(probe) / "probe").write_bytes(_PROBE)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def storage_error(error: BaseException, path: str | Path | None = None) -> StorageError | None:
    """The one-line error of a full or failing disk, or None if the error has another cause.

    Args:
        error: An error, which may have that of the disk among its causes.
        path: The output that was written. None: the file that the error names.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, StorageError):
            return cause
        text = _TEXT_OF_CODE.search(str(cause))
        code, reason = (int(text[2]), text[1]) if text else (getattr(cause, "errno", None), getattr(cause, "strerror", None))
        if code in _FULL or _TEXT_OF_FULL.search(str(cause)):
            place = path or getattr(cause, "filename", None)
            return StorageError(
                f"no space left on the disk{f' of {str(place)!r}' if place else ''}; free some space, or set another output "
                "directory"
            )
        if code in _FAILED:
            place = path or getattr(cause, "filename", None) or "an output"
            return StorageError(f"{str(place)!r}: {(reason or str(cause)).lower()}; check its disk")
        cause = cause.__cause__ or cause.__context__
    return None


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Raise a `StorageError` that names an output if its disk is full or fails.

    Args:
        path: The output, as in its setting.

    Raises:
        StorageError: If the block raises an error of the disk.
    """
    try:
        yield
    except Exception as error:
        failed = storage_error(error, path)
        if failed is None or failed is error:
            raise
        raise failed from error


def unfinished_path(path: Path) -> Path:
    """Temporary path of an output during a write; fixed, so that a later write replaces the leftover of a killed process."""
    return path.with_name(f".{path.name}.unfinished")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary sibling, and rename it after the block: a crash leaves the old file or the complete new one.

    After an error no part of the file is left.

    Args:
        path: The file; its directory is created.

    Raises:
        StorageError: If the disk is full or fails.
    """
    target = Path(path)
    unfinished = unfinished_path(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, target)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        sync(target.parent)


def sync(path: Path) -> None:
    """Flush a file, or the renames in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
