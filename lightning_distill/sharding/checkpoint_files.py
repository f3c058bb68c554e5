"""Reading of checkpoints, files and sharded directories: damaged ones are found before use, and no code of theirs is run."""

import io
import os
import shutil
import struct
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import fsspec
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_distill.digests import MANIFEST, find_damage
from lightning_distill.errors import ConfigurationError, DamagedFileError
from lightning_distill.sharding.finite import named_tensors, non_finite

METADATA = ".metadata"
"""File that marks a directory as a checkpoint of `torch.distributed.checkpoint`."""
REST = "rest.pt"
"""File of everything but weights and optimizer states, which is the same in all processes."""
LAST = "last.ckpt"
"""Link to the newest checkpoint in a directory."""

# What zipfile raises for damaged headers; unknown compression is a RuntimeError.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, OSError, EOFError, ValueError, KeyError)
_TRAINING_KEYS = ("optimizer_states", "lr_schedulers", "loops")


def local_path(path: str | Path) -> Path | None:
    """The path of a local file, given as such or as `file://` URL; None for other URLs."""
    if "://" not in str(path):
        return Path(path)
    parts = urlsplit(str(path))
    return Path(url2pathname(parts.path)) if parts.scheme == "file" else None


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Contents of a verified checkpoint file; of a sharded directory those that all processes share, without the shards.

    Args:
        path: Path or URL of a file, or path of a directory.
        mmap: Whether tensors are mapped, and read when they are used. Do not keep them longer than the file.

    Raises:
        DamagedFileError: If it is not what was written.
        ConfigurationError: If it is no checkpoint of a training, or holds objects other than tensors and plain values.
    """
    local = local_path(path)
    if local is None:
        with fsspec.open(str(path), "rb") as file:
            source: Any = io.BytesIO(file.read())
        check_records(source, path)
        return _load(source, path, mmap=False)
    if not local.exists():
        raise ConfigurationError(f"ckpt_path {str(path)!r} does not exist; set it to a checkpoint of fit")
    if local.is_dir():
        check_directory(local)
        if damage := find_damage(local, (METADATA, REST)):
            raise damaged(path, damage)
        return _load(local / REST, path, mmap=False)
    check_undamaged(local)
    return _load(local, path, mmap)


def check_undamaged(path: Path) -> None:
    """Compare a checkpoint file with its own CRC-32 sums, or a sharded directory with its manifest.

    A file is read at 1.2 GB/s (one core of an Intel Xeon). An unchanged one is read once per process.

    Raises:
        DamagedFileError: If they differ.
        ConfigurationError: If it is of another format.
    """
    if path.is_dir():
        check_directory(path)
        if damage := find_damage(path):
            raise damaged(path, damage)
    elif path.is_file():
        status = path.stat()
        _check_file(path, status.st_ino, status.st_size, status.st_mtime_ns)
    else:
        raise ConfigurationError(f"ckpt_path {str(path)!r} is neither a file nor a directory; set it to a checkpoint of fit")


def damaged(path: str | Path, damage: str) -> DamagedFileError:
    """The error for a damaged checkpoint."""
    return DamagedFileError(f"ckpt_path {str(path)!r} is damaged: {damage}; set it to another checkpoint, or to 'last'")


def check_directory(path: Path) -> None:
    """Check that a directory has the files of a sharded checkpoint, with a manifest.

    Raises:
        ConfigurationError: If not.
    """
    if lacking := [name for name in (METADATA, REST, MANIFEST) if not (path / name).is_file()]:
        raise ConfigurationError(
            f"ckpt_path {str(path)!r} is not a checkpoint of a sharded strategy: it has no {lacking[0]}; set it to a "
            "checkpoint of fit, and resume it with the trainer.strategy that saved it"
        )


@lru_cache(maxsize=64)
def _check_file(path: Path, inode: int, size: int, modified: int) -> None:
    with path.open("rb") as file:
        check_records(file, path)


def check_records(file: Any, path: str | Path) -> None:
    """Verify the CRC-32 of every record of a file of `torch.save`, which `torch.load` does not.

    Args:
        file: Seekable binary file.
        path: Its name, for the message.

    Raises:
        DamagedFileError: If one differs.
        ConfigurationError: If the file has another format.
    """
    if file.read(4) != b"PK\x03\x04":
        empty = file.seek(0, os.SEEK_END) == 0
        reason = "it is empty" if empty else "it is not in the format of torch.save"
        raise ConfigurationError(f"ckpt_path {str(path)!r} is not a checkpoint of fit ({reason}); set it to one")
    size = file.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            # torch stores records uncompressed; another file would be unpacked to any size.
            odd = [info.filename for info in archive.infolist() if info.compress_type or info.file_size > size]
            wrong = odd[0] if odd else archive.testzip()
    except _ZIP_ERRORS as error:
        raise damaged(path, f"{first_line(error)}") from error
    if wrong is not None:
        raise damaged(path, f"the checksum of its record {wrong!r} differs")


def _load(source: Any, path: str | Path, mmap: bool) -> dict[str, Any]:
    try:
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a pickle of others can raise any exception
        raise ConfigurationError(
            f"ckpt_path {str(path)!r} cannot be read: it holds more than tensors and plain values, or is no checkpoint "
            f"({first_line(error)}); set it to a checkpoint of fit"
        ) from error
    keys = ("global_step", "pytorch-lightning_version")
    lacking = [key for key in keys if key not in content] if isinstance(content, dict) else list(keys)
    if lacking:
        raise ConfigurationError(
            f"ckpt_path {str(path)!r} is not a checkpoint of fit: it has no {lacking[0]}; set it to a checkpoint, or set "
            "model.student.pretrained to an exported student"
        )
    return content


def check_content(content: dict[str, Any], path: str | Path, resumes: bool) -> None:
    """Check the contents of a checkpoint file before they are used.

    Args:
        content: The contents.
        path: Path of the file, for the message.
        resumes: Whether training continues from it, and not only its weights are used.

    Raises:
        DamagedFileError: If it has a weight that is NaN, or an optimizer state that is not finite.
        ConfigurationError: If training is to continue, and it has no optimizer states, or weights only.
    """
    if resumes and (lacking := [key for key in _TRAINING_KEYS if key not in content]):
        raise ConfigurationError(
            f"ckpt_path {str(path)!r} has no {lacking[0]}, as a checkpoint saved with save_weights_only; fit resumes only from "
            "a full checkpoint: set ckpt_path to one, or export this one and set model.student.pretrained to the export"
        )
    # Without an optimizer, Lightning counts no steps. It would start an optimizer afresh without its states.
    if resumes and content["global_step"] and not content["optimizer_states"]:
        raise ConfigurationError(
            f"ckpt_path {str(path)!r} has no state of an optimizer in its optimizer_states; fit resumes only from a full "
            "checkpoint: set ckpt_path to one, or export this one and set model.student.pretrained to the export"
        )
    states = {key: content.get(key, {}) for key in ("optimizer_states", "auxiliary_optimizers")}
    broken = non_finite(dict(named_tensors(content["state_dict"])), infinite=True) or non_finite(dict(named_tensors(states)))
    if broken:
        raise damaged(path, f"{broken[0]!r} is not finite")


def first_line(error: BaseException) -> str:
    """First sentence of an error's message, or the name of its class."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line.partition(". ")[0][:200]


def newest_checkpoint(directory: Path, verify_shards: bool = True) -> Path | None:
    """The newest checkpoint in a directory that is undamaged and finite; skipped ones are named in warnings.

    The one that `last.ckpt` links to comes first, then the others by their steps.

    Args:
        directory: The directory.
        verify_shards: Whether to verify sharded directories. One process has to: all load what the first has chosen.

    Raises:
        ConfigurationError: If there are checkpoints, and all are damaged.
    """
    link = directory / LAST
    linked = link.resolve() if link.is_symlink() else None
    found = {path.resolve() for path in directory.glob("*.ckpt") if not path.name.startswith(".") and path.exists()}
    damages: list[ConfigurationError] = []
    ranked: list[tuple[bool, int, float, Path]] = []
    for path in found:
        try:
            ranked.append((path == linked, _step(path), path.stat().st_mtime, path))
        except ConfigurationError as error:
            damages.append(error)
    chosen = None
    for *_, path in sorted(ranked, reverse=True):
        try:
            if not path.is_dir():
                check_content(read_checkpoint(path, mmap=True), path, resumes=False)
            elif verify_shards:
                check_undamaged(path)
        except ConfigurationError as error:
            damages.append(error)
            continue
        chosen = path
        break
    if damages and chosen is None:
        raise damages[0]
    for damage in damages:
        rank_zero_warn(f"{str(damage).partition(';')[0]}; it is skipped, and ckpt_path 'last' is {chosen}")
    return chosen


def _step(path: Path) -> int:
    """Number of optimizer steps of a checkpoint, which is verified only if it cannot be read."""
    try:
        if path.is_dir():
            check_directory(path)
            return int(_load(path / REST, path, mmap=False)["global_step"])
        return int(_load(path, path, mmap=True)["global_step"])
    except ConfigurationError:
        check_undamaged(path)
        raise


def recover(path: Path) -> None:
    """Restore the previous checkpoint at a path if a process was killed while it replaced it."""
    if not path.exists() and replaced(path).is_dir():
        os.replace(replaced(path), path)


def replaced(path: Path) -> Path:
    """Where the previous sharded directory of a path is while it is replaced."""
    return path.with_name(f".{path.name}.replaced")


def remove_remains(directory: Path) -> None:
    """Remove what killed processes left of checkpoints in a directory: unfinished ones and those that were replaced."""
    for path in directory.glob(".*.ckpt.replaced"):
        recover(path.with_name(path.name[1:].removesuffix(".replaced")))
    for pattern in (".*.ckpt.unfinished", ".*.ckpt.replaced"):
        for path in directory.glob(pattern):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a directory, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
