"""File format of precomputed data: latents and conditions in safetensors shards, and an index.

A directory contains `index.json`, `null.safetensors` with the condition of the empty prompt, and the shards of each split,
`train-00000.safetensors` and so on. A shard covers a fixed range of sample indices of the source data set. The range does not
depend on the process that writes the shard, or on the time. A shard omits broken samples, and its index entry lists them.
Nothing is pickled.
"""

import hashlib
import json
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
from lightning_distill.outputs import atomic_file
from lightning_distill.teachers.model_adapter import Condition

FORMAT = 1
INDEX = "index.json"
NULL = "null.safetensors"
SPLITS = ("train", "validation")
MAX_OPEN_SHARDS = 128
"""Maximum number of open shards per process."""
_LATENTS, _CONDITION = "latents.", "condition."
_HEADER = "precomputed"  # the only metadata key, because safetensors writes several keys in an order that varies between runs


@dataclass(frozen=True)
class EncodedSample:
    """An encoded sample: latents and condition, the inputs of the networks.

    Attributes:
        prompt: Caption of the image.
        latents: Latents (C, h, w), float32, or None for a prompt without an image.
        condition: Condition of the prompt, named tensors without a batch dimension.
    """

    prompt: str
    latents: Tensor | None
    condition: Condition


@dataclass(frozen=True)
class EncodedShard:
    """Index entry of a shard.

    Attributes:
        file: File name.
        sha256: SHA-256 of the file.
        size: File size in bytes.
        first: First sample index of the shard in the source data set.
        last: Last sample index of the shard in the source data set, inclusive.
        broken: Indices and descriptions of the samples whose images could not be decoded.
        buckets: Bucket of each stored sample, or None if training does not use buckets.
        image_sizes: Heights and widths of the images in pixels.
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
    def sample_indices(self) -> list[int]:
        """Indices of the stored samples in the source data set."""
        broken = {index for index, _ in self.broken}
        return [index for index in range(self.first, self.last + 1) if index not in broken]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file by `atomic_file`: a crash or an error leaves the old or the complete new file."""
    with atomic_file(path) as file:
        file.write(content)


def write_samples(path: Path, samples: Sequence[EncodedSample], dtype: torch.dtype) -> tuple[str, int]:
    """Write samples to one file, in order.

    Args:
        path: File to write.
        samples: Samples to write; their latents may differ in size.
        dtype: Storage dtype of floating-point tensors with a higher precision. Readers restore the original dtype.

    Returns:
        The SHA-256 of the file, and its size in bytes.
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
            raise _damaged_error(path) from error
        header = json.loads(self.file.metadata()[_HEADER])
        self.prompts: list[str] = header["prompts"]
        self.dtypes = {name: getattr(torch, dtype) for name, dtype in header["dtypes"].items()}
        self.names = [name for name in self.dtypes if name.startswith(_CONDITION)]
        # A file stacks latents of one size into one tensor, in sample order.
        self.latents: list[tuple[str, int]] = []
        rows: defaultdict[str, int] = defaultdict(int)
        for size in header["sizes"]:
            self.latents.append((f"{_LATENTS}{size}" if size else "", rows[size]))
            rows[size] += 1

    def read(self, row: int) -> EncodedSample:
        name, latents_row = self.latents[row]
        condition = {key.removeprefix(_CONDITION): self._row(key, row) for key in self.names}
        return EncodedSample(self.prompts[row], self._row(name, latents_row) if name else None, condition)

    def _row(self, name: str, row: int) -> Tensor:
        value: Tensor = self.file.get_slice(name)[row]
        return value.to(self.dtypes[name])


class ShardReader:
    """Random access to the samples of shards. It memory-maps files and closes the least recently used ones.

    Args:
        directory: Directory of the shards.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: OrderedDict[str, _OpenShard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """State without open files; every worker process opens files itself."""
        return {"directory": self.directory, "_open": OrderedDict()}

    def read(self, file: str, row: int) -> EncodedSample:
        """Read the sample in a row of a file."""
        return self._shard(file).read(row)

    def prompts(self, file: str) -> list[str]:
        """All prompts of a file."""
        return self._shard(file).prompts

    def _shard(self, file: str) -> _OpenShard:
        if file not in self._open:
            self._open[file] = _OpenShard(self.directory / file)
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(file)
        return self._open[file]


@dataclass(frozen=True)
class EncodedIndex:
    """Contents of `index.json`.

    Attributes:
        settings: Settings of the data by dotted name.
        shards: Shards of each split; empty until all shards are written.
        null: SHA-256 and size in bytes of the null condition's file.
    """

    settings: dict[str, Any]
    shards: dict[str, list[EncodedShard]] = field(default_factory=dict)
    null: tuple[str, int] = ("", 0)

    @property
    def complete(self) -> bool:
        """Whether all shards are written."""
        return bool(self.shards)

    @property
    def has_images(self) -> bool:
        """Whether the data includes latents, besides conditions."""
        return any(shard.image_sizes for shards in self.shards.values() for shard in shards)

    def write(self, directory: Path) -> None:
        """Write `index.json`."""
        content: dict[str, Any] = {"format": FORMAT, "complete": self.complete, "settings": self.settings}
        if self.complete:
            sizes = sorted({size for shards in self.shards.values() for shard in shards for size in shard.image_sizes})
            content |= {
                "image_sizes": sizes,
                "samples": {split: sum(len(shard.sample_indices) for shard in shards) for split, shards in self.shards.items()},
                "broken": {split: sum(len(shard.broken) for shard in shards) for split, shards in self.shards.items()},
                "null": {"file": NULL, "sha256": self.null[0], "size": self.null[1]},
                "shards": {split: [asdict(shard) for shard in shards] for split, shards in self.shards.items()},
            }
        write_atomically(directory / INDEX, (json.dumps(content) + "\n").encode())

    @classmethod
    def read(cls, directory: Path, setting: str) -> "EncodedIndex":
        """Read `index.json`.

        Args:
            directory: Directory of the precomputed data.
            setting: Name of the setting with the directory, for error messages.

        Raises:
            ConfigurationError: If the index is missing or has another format version.
        """
        path = directory / INDEX
        if not path.is_file():
            raise ConfigurationError(
                f"{setting} is {str(directory)!r}, which has no {INDEX}; give an output directory of `precompute`"
            )
        content = json.loads(path.read_text())
        if content.get("format") != FORMAT:
            raise ConfigurationError(
                f"{setting} is {str(directory)!r}, whose format is {content.get('format')!r}, not {FORMAT}; precompute again"
            )
        if not content["complete"]:
            return cls(content["settings"])
        shards = {split: [read_entry(entry) for entry in entries] for split, entries in content["shards"].items()}
        return cls(content["settings"], shards, (content["null"]["sha256"], content["null"]["size"]))

    def check_files(self, directory: Path, contents: bool) -> None:
        """Compare the files with the index.

        Args:
            directory: Directory of the precomputed data.
            contents: Whether to read the files and compare digests; otherwise only sizes are compared.

        Raises:
            ConfigurationError: If a file is missing, or its size or contents differ from the index.
        """
        expected = [(shard.file, shard.sha256, shard.size) for shards in self.shards.values() for shard in shards]
        for file, sha256, size in [(NULL, *self.null), *expected]:
            path = directory / file
            intact = path.is_file() and path.stat().st_size == size
            if intact and contents:
                intact = file_digest(path) == sha256
            if not intact:
                raise _damaged_error(path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


def _damaged_error(path: Path) -> ConfigurationError:
    return ConfigurationError(f"{path} is missing or damaged; delete it and run the same `precompute` again to rewrite it")


def read_entry(entry: Mapping[str, Any]) -> EncodedShard:
    """Parse the index entry of a shard from JSON."""
    pairs = {name: [tuple(pair) for pair in entry[name]] for name in ("broken", "image_sizes")}
    return EncodedShard(**{**entry, **pairs})
