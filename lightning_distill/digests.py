"""SHA-256 manifests of directories: damaged or missing files are found before anything is loaded from them.

The format is that of `sha256sum`, so `sha256sum -c SHA256SUMS` checks a directory as well.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "SHA256SUMS"
"""Name of the file of digests in a directory."""
_CHUNK = 1 << 20
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digests(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Digests of files of a directory by their names relative to it, computed by several threads."""
    listed = list(names)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the interpreter's lock
        return dict(zip(listed, pool.map(lambda name: sha256(directory / name), listed), strict=True))


def file_names(directory: Path) -> list[str]:
    """Names of all files of a directory and its subdirectories relative to it, sorted, without the manifest."""
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def write_manifest(directory: Path, known: dict[str, str] | None = None) -> None:
    """Write the manifest of a directory and flush it to disk.

    Args:
        directory: The directory.
        known: Digests of its files by name; None computes those of all files.
    """
    found = digests(directory, file_names(directory)) if known is None else known
    with (directory / MANIFEST).open("w", encoding="utf-8") as file:
        file.writelines(f"{digest}  {name}\n" for name, digest in sorted(found.items()))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> dict[str, str]:
    """Digests in a directory's manifest by file name.

    Raises:
        ValueError: If it has an invalid line, or names a file outside the directory.
    """
    try:
        lines = (directory / MANIFEST).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{MANIFEST} is not text") from error
    expected = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None or Path(match[2]).is_absolute() or ".." in Path(match[2]).parts:
            raise ValueError(f"{MANIFEST} has the invalid line {line[:100]!r}")
        expected[match[2]] = match[1]
    return expected


def find_damage(directory: Path, names: Iterable[str] | None = None) -> str | None:
    """Compare a directory with its manifest.

    Files that the manifest does not list are ignored, as is a directory without a manifest.

    Args:
        directory: The directory.
        names: Files to compare; None compares all that the manifest lists.

    Returns:
        The first difference, such as "model.safetensors is not what was written", or None.
    """
    if not (directory / MANIFEST).is_file():
        return None
    try:
        expected = read_manifest(directory)
    except ValueError as error:
        return str(error)
    listed = list(expected if names is None else names)
    if unlisted := [name for name in listed if name not in expected]:
        return f"{MANIFEST} does not list {unlisted[0]}"
    if missing := [name for name in listed if not (directory / name).is_file()]:
        return f"{missing[0]} is missing"
    differing = [name for name, digest in digests(directory, listed).items() if digest != expected[name]]
    return f"{differing[0]} is not what was written (its SHA-256 differs from {MANIFEST})" if differing else None
