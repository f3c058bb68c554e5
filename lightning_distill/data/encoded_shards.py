"""The format of precomputed data: latents and conditions in safetensors files, and an index of them.

A directory holds `index.json`, `null.safetensors` with the condition of the empty prompt, and `train-00000.safetensors` and so
on of each split. A shard covers a stretch of places in the data set that it was made from, whoever wrote it and whenever, and
lists the broken ones, which it leaves out. Nothing is pickled.
"""

import hashlib
import json
import os
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.teachers.model_adapter import Condition

FORMAT = 1
INDEX = "index.json"
NULL = "null.safetensors"
SPLITS = ("train", "validation")
OPEN_SHARDS = 128
"""Most shards that a process keeps open."""
_LATENTS, _CONDITION = "latents.", "condition."
_HEADER = "precomputed"  # the only key of the metadata: safetensors writes several in an order that changes from run to run


@dataclass(frozen=True)
class EncodedSample:
    """A sample as the networks see it.

    Attributes:
        prompt: What the picture shows.
        latents: (C, h, w), float32, or None of a prompt without a picture.
        condition: Of the prompt, named tensors without the batch.
    """

    prompt: str
    latents: Tensor | None
    condition: Condition


@dataclass(frozen=True)
class EncodedShard:
    """What the index says of a shard.

    Attributes:
        file: Its name.
        sha256: Of its bytes.
        size: Number of them.
        first: First place of its stretch in the data set.
        last: Last one.
        broken: Places whose pictures could not be read, and what is told of them.
        buckets: Of the samples that are there, where training takes batches of one bucket.
        image_sizes: Heights and widths of its pictures in pixels.
    """

    file: str
    sha256: str
    size: int
    first: int
    last: int
    broken: list[tuple[int, str]]
    buckets: list[int] | None
    image_sizes: list[tuple[int, int]]

    @property
    def places(self) -> list[int]:
        """Of the samples that are there."""
        left_out = {place for place, _ in self.broken}
        return [place for place in range(self.first, self.last + 1) if place not in left_out]


def unfinished(path: Path) -> Path:
    """Where a file is written before it takes its name; a fixed place, so that what a killed process left is overwritten."""
    return path.with_name(f".{path.name}.unfinished")


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the target, flush to the disk, then rename: a crash leaves the old file, or the whole new one."""
    with unfinished(path).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished(path), path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself reaches the disk
    finally:
        os.close(descriptor)


def write_samples(path: Path, samples: Sequence[EncodedSample], dtype: torch.dtype) -> tuple[str, int]:
    """Write samples as one file, in their order.

    Args:
        path: The file.
        samples: Whose latents may differ in size.
        dtype: Floating numbers of higher precision are rounded to it; they come back in the precision that they had.

    Returns:
        The digest of its bytes, and their number.
    """
    columns: defaultdict[str, list[Tensor]] = defaultdict(list)
    sizes, dtypes = [], {}
    for sample in samples:
        size = "" if sample.latents is None else "x".join(map(str, sample.latents.shape[1:]))
        sizes.append(size)
        latents = {} if sample.latents is None else {f"{_LATENTS}{size}": sample.latents}
        for name, value in {**latents, **{f"{_CONDITION}{name}": value for name, value in sample.condition.items()}}.items():
            dtypes[name] = str(value.dtype).removeprefix("torch.")
            columns[name].append(value.to(dtype) if value.is_floating_point() and value.itemsize > dtype.itemsize else value)
    header = {"prompts": [sample.prompt for sample in samples], "sizes": sizes, "dtypes": dtypes}
    tensors = {name: torch.stack(values).contiguous() for name, values in columns.items()}
    content = save(tensors, {_HEADER: json.dumps(header)})
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest(), len(content)


class _OpenShard:
    def __init__(self, path: Path) -> None:
        try:
            self.file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise _damaged(path) from error
        header = json.loads(self.file.metadata()[_HEADER])
        self.prompts: list[str] = header["prompts"]
        self.dtypes = {name: getattr(torch, dtype) for name, dtype in header["dtypes"].items()}
        self.names = [name for name in self.dtypes if name.startswith(_CONDITION)]
        # Latents of one size lie together, in the order of their samples.
        self.latents: list[tuple[str, int]] = []
        seen: defaultdict[str, int] = defaultdict(int)
        for size in header["sizes"]:
            self.latents.append((f"{_LATENTS}{size}" if size else "", seen[size]))
            seen[size] += 1

    def read(self, row: int) -> EncodedSample:
        name, place = self.latents[row]
        condition = {key.removeprefix(_CONDITION): self._row(key, row) for key in self.names}
        return EncodedSample(self.prompts[row], self._row(name, place) if name else None, condition)

    def _row(self, name: str, row: int) -> Tensor:
        value: Tensor = self.file.get_slice(name)[row]
        return value.to(self.dtypes[name])


class ShardReader:
    """Reads samples of files at random; files are mapped into memory, and the least used ones closed.

    Args:
        directory: Where they are.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: OrderedDict[str, _OpenShard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, which worker processes open for themselves."""
        return {"directory": self.directory, "_open": OrderedDict()}

    def read(self, file: str, row: int) -> EncodedSample:
        """A sample of a file."""
        return self._shard(file).read(row)

    def prompts(self, file: str) -> list[str]:
        """All prompts of a file."""
        return self._shard(file).prompts

    def _shard(self, file: str) -> _OpenShard:
        if file not in self._open:
            self._open[file] = _OpenShard(self.directory / file)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(file)
        return self._open[file]


@dataclass(frozen=True)
class EncodedIndex:
    """What `index.json` says.

    Attributes:
        settings: What the data was made with, by dotted names.
        shards: Of each split; none before all are there.
        null: Digest and number of bytes of the null condition's file.
    """

    settings: dict[str, Any]
    shards: dict[str, list[EncodedShard]] = field(default_factory=dict)
    null: tuple[str, int] = ("", 0)

    @property
    def complete(self) -> bool:
        """Whether all of it is there."""
        return bool(self.shards)

    @property
    def has_images(self) -> bool:
        """Whether there are latents, and not conditions alone."""
        return any(shard.image_sizes for shards in self.shards.values() for shard in shards)

    def write(self, directory: Path) -> None:
        """Write it."""
        content: dict[str, Any] = {"format": FORMAT, "complete": self.complete, "settings": self.settings}
        if self.complete:
            sizes = sorted({size for shards in self.shards.values() for shard in shards for size in shard.image_sizes})
            content |= {
                "image_sizes": sizes,
                "samples": {split: sum(len(shard.places) for shard in shards) for split, shards in self.shards.items()},
                "broken": {split: sum(len(shard.broken) for shard in shards) for split, shards in self.shards.items()},
                "null": {"file": NULL, "sha256": self.null[0], "size": self.null[1]},
                "shards": {split: [asdict(shard) for shard in shards] for split, shards in self.shards.items()},
            }
        write_atomically(directory / INDEX, (json.dumps(content) + "\n").encode())

    @classmethod
    def read(cls, directory: Path, setting: str) -> "EncodedIndex":
        """Read it.

        Args:
            directory: Of the data.
            setting: Name of the setting that gives the directory, for errors.

        Raises:
            ConfigurationError: If there is none, or it is of another format.
        """
        path = directory / INDEX
        if not path.is_file():
            raise ConfigurationError(
                f"{setting} is {str(directory)!r}, which holds no {INDEX}; give a directory that `precompute` has written"
            )
        content = json.loads(path.read_text())
        if content.get("format") != FORMAT:
            raise ConfigurationError(
                f"{setting} is {str(directory)!r}, whose format is {content.get('format')!r} and not {FORMAT}; precompute again"
            )
        if not content["complete"]:
            return cls(content["settings"])
        shards = {split: [read_entry(entry) for entry in entries] for split, entries in content["shards"].items()}
        return cls(content["settings"], shards, (content["null"]["sha256"], content["null"]["size"]))

    def check_files(self, directory: Path, contents: bool) -> None:
        """Compare the files with the index.

        Args:
            directory: Of the data.
            contents: Whether to read all of them, rather than to look at their sizes.

        Raises:
            ConfigurationError: If one is missing, of another size, or has other contents.
        """
        expected = [(shard.file, shard.sha256, shard.size) for shards in self.shards.values() for shard in shards]
        for file, sha256, size in [(NULL, *self.null), *expected]:
            path = directory / file
            whole = path.is_file() and path.stat().st_size == size
            if whole and contents:
                whole = file_digest(path) == sha256
            if not whole:
                raise _damaged(path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


def _damaged(path: Path) -> ConfigurationError:
    return ConfigurationError(
        f"{path} is missing or damaged; remove what is there of it, and run the same `precompute` again, which makes it anew"
    )


def read_entry(entry: Mapping[str, Any]) -> EncodedShard:
    """What was written of a shard."""
    pairs = {name: [tuple(pair) for pair in entry[name]] for name in ("broken", "image_sizes")}
    return EncodedShard(**{**entry, **pairs})
