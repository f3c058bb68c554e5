"""Fingerprints of pipeline directories, without reading all their bytes."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

SAMPLE = 1 << 20
"""Number of bytes read at the start of a file, and at its end."""


def fingerprint(directory: Path, components: Iterable[str]) -> str:
    """A digest (16 hexadecimal digits) of the files of some components; it does not depend on the directory's path.

    The digest covers the name, the size, and the first and last mebibyte of each file. It thus covers settings and
    tokenizers completely, and enough of the weights to detect further training. Computing it takes milliseconds.

    Args:
        directory: Directory of a pipeline.
        components: Names of subdirectories.
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
