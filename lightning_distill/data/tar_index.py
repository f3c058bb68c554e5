"""Index of a tar file: the samples that its headers name, and a cache of them next to the file."""

import json
import os
import tarfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from lightning_distill.data.tally import Tally
from lightning_distill.data.tar_members import TarIndex, TarMembers, TarSample
from lightning_distill.errors import ConfigurationError
from lightning_distill.outputs import atomic_file

INDEX = ".index.json"
"""Suffix of the index files next to the shards, which cache the contents of the headers."""
_VERSION = 5
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
"""First bytes of compressed files, and the programs that unpack them."""
# `tarfile` raises these for damaged and for hostile files, besides its own.
_TAR_ERRORS = (tarfile.TarError, OSError, ValueError, ArithmeticError, MemoryError, RecursionError)


def load_index(path: Path, caption_column: str | None) -> TarIndex | None:
    """Index of a shard from its index file, or None if that is missing, damaged or of another state of the shard.

    An index file is a cache, so that damage is no error. It is valid if the shard's size, its modification time and the caption
    column are unchanged, and if its checksum holds.
    """
    try:
        header, _, body = _index_path(path).read_bytes().partition(b"\n")
        state = _state(path, caption_column)
        if json.loads(header) != {**state, "crc32": zlib.crc32(body)}:
            return None
        content = json.loads(body)
        samples = [TarSample(**{**sample, "captions": tuple(sample["captions"])}) for sample in content["samples"]]
        if not all(0 <= sample.offset <= sample.offset + sample.size <= state["size"] for sample in samples):
            return None
        return TarIndex(samples, Tally.from_json(content["skipped"]), Tally.from_json(content["remarks"]))
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None


def store_index(path: Path, caption_column: str | None, index: TarIndex) -> None:
    """Write the index file of a shard.

    Raises:
        StorageError: If its disk is full or read-only.
        OSError: If it cannot be written for another reason, such as permissions.
    """
    samples = [asdict(sample) for sample in index.samples]
    content = {"skipped": index.skipped.to_json(), "remarks": index.remarks.to_json(), "samples": samples}
    body = json.dumps(content).encode()
    header = json.dumps({**_state(path, caption_column), "crc32": zlib.crc32(body)}).encode()
    with atomic_file(_index_path(path)) as file:
        file.write(header + b"\n" + body)


def _index_path(path: Path) -> Path:
    return path.with_name(path.name + INDEX)


def _state(path: Path, caption_column: str | None) -> dict[str, Any]:
    return {"version": _VERSION, "caption_column": caption_column, **file_state(path.stat())}


def file_state(stat: os.stat_result) -> dict[str, int]:
    """Size and modification time, which tell whether a file is the one whose headers were read."""
    return {"size": stat.st_size, "changed": stat.st_mtime_ns}


def scan(path: Path, caption_column: str | None) -> TarIndex:
    """Read the index of a shard from its contents.

    Args:
        path: Path of the shard.
        caption_column: Key of the captions in `.json` files, which then win over `.txt` files. None prefers `.txt` files, and
            tries the usual keys in `.json` files.

    Raises:
        ConfigurationError: If the shard is damaged, cut short or not an uncompressed tar file.
    """
    members = TarMembers(caption_column)
    try:
        with path.open("rb") as file:
            _check_uncompressed(path, file)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                end = 0
                for member in archive:
                    if archive.offset <= end:
                        raise tarfile.ReadError("a header with a negative size")
                    end = archive.offset
                    members.add(archive, member)
                complete = _check_end(path, file, end)
    except _TAR_ERRORS as error:
        if isinstance(error, ConfigurationError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigurationError(f"{path} is not an intact tar file ({reason}); replace or remove it") from error
    index = members.index()
    if not complete:
        index.remarks.add("tar files without an end mark, perhaps cut short", "")
    return index


def _check_uncompressed(path: Path, file: BinaryIO) -> None:
    start = file.read(max(map(len, _COMPRESSED)))
    file.seek(0)
    for mark, program in _COMPRESSED.items():
        if start.startswith(mark):
            raise ConfigurationError(
                f"{path} is compressed, and samples are read in any order, which needs a plain tar file; unpack it with "
                f"`{program}`, images are compressed anyway"
            )


def _check_end(path: Path, file: BinaryIO, end: int) -> bool:
    """Check that nothing follows the last member, since `tarfile` ends at a damaged header as at the end mark.

    Returns:
        Whether the file has an end mark.
    """
    file.seek(end)
    found = False
    while block := file.read(1 << 20):
        if block.count(0) != len(block):
            raise ConfigurationError(
                f"{path} has a damaged header, or another tar file appended, after byte {end}; replace it, or pack it again"
            )
        found = True
    return found
