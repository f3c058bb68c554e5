"""Telling one pipeline directory from another without reading all of it."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

SAMPLE = 1 << 20
"""Bytes that are read of a file's start and of its end."""


def fingerprint(directory: Path, components: Iterable[str]) -> str:
    """A digest, of 16 digits, of the files of some components, wherever the directory lies.

    Of each file its name, its size, its first and its last mebibyte count: settings and tokenizers are read whole, and
    of weights enough to see that they were trained further, in milliseconds.

    Args:
        directory: Of a pipeline.
        components: Names of its subdirectories.
    """
    digest = hashlib.sha256()
    for component in sorted(components):
        for path in sorted((directory / component).rglob("*")):
            if not path.is_file():
                continue
            size = path.stat().st_size
            digest.update(f"{path.relative_to(directory).as_posix()}\0{size}\0".encode())
            with path.open("rb") as file:
                digest.update(file.read(SAMPLE))
                if size > SAMPLE:
                    file.seek(max(SAMPLE, size - SAMPLE), os.SEEK_SET)
                    digest.update(file.read())
    return digest.hexdigest()[:16]
