"""Output directory of `precompute`: which shards are complete, and how a run adds the others."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_distill.data.encoded_index import INDEX, EncodedIndex, EncodedShard, read_entry
from lightning_distill.data.encoded_shards import NULL, EncodedSample, write_samples
from lightning_distill.digests import sha256
from lightning_distill.errors import ConfigurationError
from lightning_distill.outputs import atomic_file, directory_contents, unfinished_path

ENTRY = ".json"
"""Suffix of the files with the index entries of single shards, until all shards are complete."""


@dataclass(frozen=True)
class ShardRange:
    """Sample indices that one shard covers.

    Attributes:
        split: "train" or "validation".
        number: Number of the shard in its split.
        first: First sample index.
        last: Last sample index, inclusive.
    """

    split: str
    number: int
    first: int
    last: int

    @property
    def file(self) -> str:
        """File name of the shard."""
        return f"{self.split}-{self.number:05}.safetensors"


class EncodedDirectory:
    """Output directory of `precompute`.

    Several processes write shards at the same time, each with a file for its index entry. At the end one process collects the
    entries in `index.json`. An interrupted run leaves an incomplete index, complete shards and their entries.

    Args:
        path: The directory.
        settings: Settings that determine the contents, as JSON values by dotted name.
        dtype: Storage dtype of floating-point tensors with a higher precision.
    """

    def __init__(self, path: Path, settings: dict[str, Any], dtype: torch.dtype) -> None:
        self.path = path
        self.settings = settings
        self.dtype = dtype

    def complete_shards(self) -> dict[str, EncodedShard]:
        """Index entries of the complete shards by file name.

        Raises:
            ConfigurationError: If the directory has other contents, or data of other settings.
        """
        if not (self.path / INDEX).is_file():
            # Another process may create the index at this moment.
            own = {INDEX, unfinished_path(self.path / INDEX).name}
            if self.path.is_dir() and any(path.name not in own for path in directory_contents(self.path)):
                raise ConfigurationError(
                    f"out is {str(self.path)!r}, which has contents other than precomputed data; choose another directory"
                )
            return {}
        index = EncodedIndex.read(self.path, "out")
        for name in {**index.settings, **self.settings}:
            stored, current = index.settings.get(name), self.settings.get(name)
            if stored != current:
                raise ConfigurationError(
                    f"out is {str(self.path)!r}, which has data with {name} {stored!r}, but {name} is {current!r} now; choose "
                    "another directory, or the settings of the stored data"
                )
        entries = [entry for shards in index.shards.values() for entry in shards]
        entries += [entry for path in self.path.glob(f"*{ENTRY}") if path.name != INDEX and (entry := _stored_entry(path))]
        present = {entry.file: entry for entry in entries if (self.path / entry.file).is_file()}
        return {file: entry for file, entry in present.items() if (self.path / file).stat().st_size == entry.size}

    def create(self) -> None:
        """Create the directory with an incomplete index, unless it has an index."""
        if not (self.path / INDEX).is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            EncodedIndex(self.settings).write(self.path)

    @property
    def has_null(self) -> bool:
        """Whether the null condition is written."""
        return (self.path / NULL).is_file()

    def write_null(self, sample: EncodedSample) -> None:
        """Write the null condition."""
        write_samples(self.path / NULL, [sample], self.dtype)

    def write_shard(
        self,
        shard: ShardRange,
        samples: Sequence[EncodedSample],
        broken: list[tuple[int, str]],
        buckets: list[int] | None,
        image_sizes: list[tuple[int, int]],
    ) -> None:
        """Write a shard, then its index entry.

        Args:
            shard: Range of the shard.
            samples: Encoded samples in the order of their indices.
            broken: Indices and descriptions of the samples that could not be decoded.
            buckets: Bucket of each sample, or None if training does not use buckets.
            image_sizes: Heights and widths of the images in pixels.
        """
        digest, size = write_samples(self.path / shard.file, samples, self.dtype)
        entry = EncodedShard(shard.file, digest, size, shard.first, shard.last, broken, buckets, image_sizes)
        with atomic_file(self._entry_path(shard)) as file:
            file.write(json.dumps(asdict(entry)).encode())

    def complete(self, shards: Sequence[ShardRange], earlier: Mapping[str, EncodedShard]) -> None:
        """Write the complete index, and delete the files with single entries.

        Args:
            shards: Ranges of all shards.
            earlier: Index entries of the shards that an earlier run completed, by file name.
        """
        entries: dict[str, list[EncodedShard]] = {}
        for shard in shards:
            entries.setdefault(shard.split, []).append(_stored_entry(self._entry_path(shard)) or earlier[shard.file])
        null = self.path / NULL
        EncodedIndex(self.settings, entries, (sha256(null), null.stat().st_size)).write(self.path)
        for shard in shards:
            self._entry_path(shard).unlink(missing_ok=True)
        written = [entry for parts in entries.values() for entry in parts]
        rank_zero_info(
            f"Precomputed {sum(entry.samples for entry in written)} samples in {len(written)} shards in "
            f"{self.path}; skipped {sum(len(entry.broken) for entry in written)} broken samples"
        )

    def _entry_path(self, shard: ShardRange) -> Path:
        return (self.path / shard.file).with_suffix(ENTRY)


def _stored_entry(path: Path) -> EncodedShard | None:
    """Index entry of a shard from its file, or None if that is missing or damaged, so that the shard is written again."""
    try:
        entry = read_entry(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return entry if Path(entry.file).stem == path.stem else None
