"""Captioned pictures in tar files, as webdataset writes them, read at random.

A sample is the files of one name without its ending: a picture (`.jpg`, `.jpeg`, `.png`, `.webp`) and a caption (`.txt`, or
`.json` with the caption under a key). The headers are read once; where each picture lies is then known, so an order is a
permutation, and a resumed run goes on with the very sample that came next, whatever the number of workers. Nothing is unpickled
or run.
"""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from lightning_distill.data.image_folder import UNREADABLE, upright_size
from lightning_distill.errors import ConfigurationError

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
INDEX = ".index.json"
"""Ending of the files that the headers' contents are kept in, beside the shards."""


@dataclass(frozen=True)
class TarSample:
    """Where a picture lies, and what it shows.

    Attributes:
        name: Of its file within the shard.
        offset: Its first byte.
        size: Number of its bytes.
        caption: What it shows.
        height: Of the picture, in pixels.
        width: Likewise.
    """

    name: str
    offset: int
    size: int
    caption: str
    height: int
    width: int


class TarShards:
    """Samples of several shards, one after the other.

    Args:
        paths: The shards, in order.
        caption_key: Key of the caption in `.json` files.

    Raises:
        ConfigurationError: If a shard is no tar file, or there are no samples.
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
                f"{self.paths[0]} and what follows hold no picture ({', '.join(PICTURES)}) with a caption (.txt, or .json with "
                f"the key {caption_key!r}); correct the path, or set data.caption_column"
            )
        self._files: dict[int, BinaryIO] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, which worker processes open for themselves."""
        return {**self.__dict__, "_files": {}}

    def place(self, index: int) -> str:
        """Where a sample is, for messages."""
        number, sample = self.samples[index]
        return f"{sample.name} in {self.paths[number]}"

    def caption(self, index: int) -> str:
        """What a picture shows."""
        return self.samples[index][1].caption

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        sample = self.samples[index][1]
        return sample.height, sample.width

    def picture(self, index: int) -> io.BytesIO:
        """The bytes of a picture."""
        number, sample = self.samples[index]
        if number not in self._files:
            self._files[number] = self.paths[number].open("rb")
        return io.BytesIO(os.pread(self._files[number].fileno(), sample.size, sample.offset))


def read_index(path: Path, caption_key: str) -> tuple[list[TarSample], int]:
    """The samples of a shard, and the number of pictures that no size could be read of.

    They are kept in a file beside the shard, which counts as long as the shard's size, its time of change and the key are the
    same.

    Raises:
        ConfigurationError: If it is no tar file.
    """
    state = path.stat()
    known = {"version": 2, "size": state.st_size, "changed": state.st_mtime_ns, "caption_key": caption_key}
    kept = path.with_name(path.name + INDEX)
    if kept.is_file():
        found = json.loads(kept.read_text())
        if {name: found.get(name) for name in known} == known:
            return [TarSample(**sample) for sample in found["samples"]], found["unreadable"]
    samples, unreadable = scan(path, caption_key)
    if os.access(path.parent, os.W_OK):
        temporary = kept.with_name(f"{kept.name}.{os.getpid()}")
        temporary.write_text(json.dumps({**known, "unreadable": unreadable, "samples": [asdict(sample) for sample in samples]}))
        temporary.replace(kept)
    return samples, unreadable


def scan(path: Path, caption_key: str) -> tuple[list[TarSample], int]:
    """The samples of a shard, and the number of pictures that no size could be read of, from its contents.

    Raises:
        ConfigurationError: If it is no tar file.
    """
    pictures: dict[str, tarfile.TarInfo] = {}
    captions: dict[str, str] = {}
    sizes: dict[str, tuple[int, int]] = {}
    unreadable = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                stem, dot, ending = file.partition(".")
                key, ending = f"{folder}/{stem}", (dot + ending).lower()
                content = archive.extractfile(member) if member.isfile() else None
                if content is None:
                    continue
                if ending in PICTURES:
                    try:
                        size = upright_size(Image.open(content))  # reads the header only
                    except UNREADABLE:
                        unreadable += 1
                        continue
                    pictures[key], sizes[key] = member, size
                elif ending in (".txt", ".json"):
                    text = _caption(content.read(), ending, caption_key)
                    if text is not None:
                        captions[key] = text
    except tarfile.TarError as error:
        raise ConfigurationError(f"{path} is no plain tar file ({error}); replace or remove it") from error
    return [
        TarSample(member.name, member.offset_data, member.size, captions[key], *sizes[key])
        for key, member in pictures.items()
        if key in captions
    ], unreadable


def _caption(content: bytes, ending: str, key: str) -> str | None:
    try:
        if ending == ".txt":
            return content.decode().strip()
        entry = json.loads(content)
    except ValueError:  # not UTF-8, or not JSON
        return None
    found = entry.get(key) if isinstance(entry, dict) else None
    return found if isinstance(found, str) else None
