"""Tar files for tests."""

import io
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

Members = Iterable[tuple[str, bytes]]


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member to a tar file."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def encoded_image(value: int, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    """Encode a uniform gray image of (width, height)."""
    file = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: Members) -> Path:
    """Write a tar file."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            add(archive, name, content)
    return path


def sparse_member(name: str, size: int) -> bytes:
    """Header and block of a member in GNU's sparse format that unpacks to `size` bytes."""
    fields = {0: name.encode(), 100: b"0000644\0", 124: b"%011o\0" % 512, 156: b"S", 257: b"ustar  \0"}
    fields |= {386: b"%011o\0" % 0, 398: b"%011o\0" % 512, 483: b"%011o\0" % size, 148: b" " * 8}
    header = bytearray(512)
    for position, value in fields.items():
        header[position : position + len(value)] = value
    header[148:156] = struct.pack("8s", b"%06o\0 " % sum(header))
    return bytes(header) + b"a" * 512
