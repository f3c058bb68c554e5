"""Index of precomputed data: `index.json`, which lists the shards, and its comparison with the files."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning_distill.data.encoded_shards import NULL, damaged_error
from lightning_distill.digests import digests
from lightning_distill.errors import ConfigurationError
from lightning_distill.outputs import atomic_file

FORMAT = 2
INDEX = "index.json"
SPLITS = ("train", "validation")
VERIFIED_BYTES = 1 << 33
"""Total size up to which files are compared with their digests by default; a core reads about a gigabyte per second."""
_FILE = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}\.safetensors")


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
    def samples(self) -> int:
        """Number of stored samples."""
        return self.last - self.first + 1 - len(self.broken)

    @property
    def sample_indices(self) -> list[int]:
        """Indices of the stored samples in the source data set."""
        broken = {index for index, _ in self.broken}
        return [index for index in range(self.first, self.last + 1) if index not in broken]


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
                "samples": {split: sum(shard.samples for shard in shards) for split, shards in self.shards.items()},
                "broken": {split: sum(len(shard.broken) for shard in shards) for split, shards in self.shards.items()},
                "null": {"file": NULL, "sha256": self.null[0], "size": self.null[1]},
                "shards": {split: [asdict(shard) for shard in shards] for split, shards in self.shards.items()},
            }
        content["sha256"] = _digest(content)
        with atomic_file(directory / INDEX) as file:
            file.write((json.dumps(content) + "\n").encode())

    @classmethod
    def read(cls, directory: Path, setting: str) -> "EncodedIndex":
        """Read `index.json`.

        Args:
            directory: Directory of the precomputed data.
            setting: Name of the setting with the directory, for error messages.

        Raises:
            ConfigurationError: If the index is missing or damaged, or has another format version.
        """
        path = directory / INDEX
        if not path.is_file():
            raise ConfigurationError(
                f"{setting} is {str(directory)!r}, which has no {INDEX}; give an output directory of `precompute`"
            )
        try:
            content = json.loads(path.read_bytes())
            if content.get("format") != FORMAT:
                raise ConfigurationError(
                    f"{setting} is {str(directory)!r}, whose format is {content.get('format')!r}, not {FORMAT}; "
                    "precompute again"
                )
            return cls._parse(content)
        except ConfigurationError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigurationError(
                f"{setting} is {str(directory)!r}, whose {INDEX} is damaged ({reason}); precompute again into another directory"
            ) from error

    @classmethod
    def _parse(cls, content: dict[str, Any]) -> "EncodedIndex":
        if content.pop("sha256", None) != _digest(content):
            raise ValueError("it is not what was written")
        if not content["complete"]:
            return cls(dict(content["settings"]))
        shards = {split: [read_entry(entry) for entry in content["shards"].get(split, [])] for split in SPLITS}
        null = str(content["null"]["sha256"]), int(content["null"]["size"])
        return cls(dict(content["settings"]), shards, null)

    def check_files(self, directory: Path, contents: bool | None) -> None:
        """Compare the files with the index.

        Args:
            directory: Directory of the precomputed data.
            contents: Whether to read the files and compare digests; otherwise only sizes are compared. None reads the files if
                they have no more than `VERIFIED_BYTES`.

        Raises:
            ConfigurationError: If a file is missing, or its size or contents differ from the index.
        """
        entries = [(shard.file, shard.sha256, shard.size) for shards in self.shards.values() for shard in shards]
        expected = {file: (sha256, size) for file, sha256, size in [(NULL, *self.null), *entries]}
        damaged = [
            file
            for file, (_, size) in expected.items()
            if not (directory / file).is_file() or (directory / file).stat().st_size != size
        ]
        if contents or (contents is None and sum(size for _, size in expected.values()) <= VERIFIED_BYTES):
            found = digests(directory, [file for file in expected if file not in damaged])
            damaged += [file for file, sha256 in found.items() if sha256 != expected[file][0]]
        if damaged:
            raise damaged_error(directory / damaged[0], len(damaged))


def read_entry(entry: Mapping[str, Any]) -> EncodedShard:
    """Parse the index entry of a shard from JSON.

    Raises:
        ValueError: If its values do not fit each other, or its file is not in the directory of the index. Values of other types
            also raise `TypeError` or `KeyError`.
    """
    pairs = {name: [tuple(pair) for pair in entry[name]] for name in ("broken", "image_sizes")}
    shard = EncodedShard(**{**{each.name: entry[each.name] for each in fields(EncodedShard)}, **pairs})
    if not _FILE.fullmatch(shard.file):
        raise ValueError(f"it names the file {shard.file!r}")
    # A sample takes more than a byte, so that the count is known to be wrong before a list of indices fills the memory.
    if not 0 <= shard.first <= shard.last + 1 or not 0 <= shard.samples <= shard.size:
        raise ValueError(f"it counts {shard.samples} samples in the {shard.size} bytes of {shard.file}")
    broken = {index for index, _ in shard.broken}
    valid = len(broken) == len(shard.broken) and all(shard.first <= index <= shard.last for index in broken)
    if not valid or (shard.buckets is not None and len(shard.buckets) != shard.samples):
        raise ValueError(f"it has wrong counts for {shard.file}")
    return shard


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
