"""Random access to captioned images in tar files of the webdataset layout.

The files of a sample share one name and differ in the suffix. A sample has an image (`.jpg`, `.jpeg`, `.png`, `.webp`) and a
caption (`.txt`, or `.json` with the caption under a key). The tar headers are read once, and an index stores the byte offset of
each image. A sample order is therefore a permutation of indices. A resumed run continues with the exact next sample, for any
number of workers. Nothing is unpickled or executed.
"""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lightning_distill.data.image_files import ImageDecodeError, read_size
from lightning_distill.errors import ConfigurationError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
INDEX = ".index.json"
"""Suffix of the index files next to the shards, which cache the contents of the headers."""


@dataclass(frozen=True)
class TarSample:
    """Location, caption and size of an image in a shard.

    Attributes:
        name: File name of the image within the shard.
        offset: Byte offset of the image within the shard.
        size: File size of the image in bytes.
        caption: Caption of the image.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
    """

    name: str
    offset: int
    size: int
    caption: str
    height: int
    width: int


class TarShards:
    """Samples of several shards, concatenated.

    Args:
        paths: Paths of the shards, in order.
        caption_key: Key of the caption in `.json` files.

    Raises:
        ConfigurationError: If a shard is not an uncompressed tar file, or there are no samples.
    """

    def __init__(self, paths: Sequence[Path], caption_key: str = "caption") -> None:
        self.paths = list(paths)
        self.samples: list[tuple[int, TarSample]] = []
        self.unreadable = 0
        for number, path in enumerate(self.paths):
            samples, unreadable = read_index(path, caption_key)
            self.samples += [(number, sample) for sample in samples]
            self.unreadable += unreadable
        if not self.samples:
            raise ConfigurationError(
                f"the tar files from {self.paths[0]} on have no image ({', '.join(IMAGE_SUFFIXES)}) with a caption (.txt, or "
                f".json with the key {caption_key!r}); correct the path, or set data.caption_column"
            )
        self._files: dict[int, BinaryIO] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getstate__(self) -> dict[str, Any]:
        """State without open files; every worker process opens files itself."""
        return {**self.__dict__, "_files": {}}

    def location(self, index: int) -> str:
        """Location of a sample, for messages."""
        number, sample = self.samples[index]
        return f"{sample.name} in {self.paths[number]}"

    def caption(self, index: int) -> str:
        """Caption of a sample."""
        return self.samples[index][1].caption

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        sample = self.samples[index][1]
        return sample.height, sample.width

    def open_image(self, index: int) -> io.BytesIO:
        """Encoded image file of a sample."""
        number, sample = self.samples[index]
        if number not in self._files:
            self._files[number] = self.paths[number].open("rb")
        return io.BytesIO(os.pread(self._files[number].fileno(), sample.size, sample.offset))


def read_index(path: Path, caption_key: str) -> tuple[list[TarSample], int]:
    """Samples of a shard, and the number of images with unreadable headers, from the shard's index file if it is valid.

    The index file is next to the shard. It is valid if the shard's size, modification time and the caption key are unchanged.
    Otherwise the function scans the shard and writes the index file.

    Raises:
        ConfigurationError: If the shard is not an uncompressed tar file.
    """
    state = path.stat()
    version = {"version": 2, "size": state.st_size, "changed": state.st_mtime_ns, "caption_key": caption_key}
    index_path = path.with_name(path.name + INDEX)
    if index_path.is_file():
        index = json.loads(index_path.read_text())
        if {name: index.get(name) for name in version} == version:
            return [TarSample(**sample) for sample in index["samples"]], index["unreadable"]
    samples, unreadable = scan(path, caption_key)
    if os.access(path.parent, os.W_OK):
        index = {**version, "unreadable": unreadable, "samples": [asdict(sample) for sample in samples]}
        temporary = index_path.with_name(f"{index_path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(index))
        temporary.replace(index_path)
    return samples, unreadable


def scan(path: Path, caption_key: str) -> tuple[list[TarSample], int]:
    """Read the samples of a shard, and the number of images with unreadable headers, from its contents.

    Raises:
        ConfigurationError: If the shard is not an uncompressed tar file.
    """
    images: dict[str, tarfile.TarInfo] = {}
    captions: dict[str, str] = {}
    sizes: dict[str, tuple[int, int]] = {}
    unreadable = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                stem, dot, suffix = file.partition(".")
                key, suffix = f"{folder}/{stem}", (dot + suffix).lower()
                content = archive.extractfile(member) if member.isfile() else None
                if content is None:
                    continue
                if suffix in IMAGE_SUFFIXES:
                    try:
                        size = read_size(content)  # reads the header only
                    except ImageDecodeError:
                        unreadable += 1
                        continue
                    images[key], sizes[key] = member, size
                elif suffix in (".txt", ".json"):
                    text = _caption(content.read(), suffix, caption_key)
                    if text is not None:
                        captions[key] = text
    except tarfile.TarError as error:
        raise ConfigurationError(f"{path} is not an uncompressed tar file ({error}); replace or remove it") from error
    return [
        TarSample(member.name, member.offset_data, member.size, captions[key], *sizes[key])
        for key, member in images.items()
        if key in captions
    ], unreadable


def _caption(content: bytes, suffix: str, key: str) -> str | None:
    try:
        if suffix == ".txt":
            return content.decode().strip()
        entry = json.loads(content)
    except ValueError:  # not UTF-8, or not JSON
        return None
    caption = entry.get(key) if isinstance(entry, dict) else None
    return caption if isinstance(caption, str) else None
