"""File format of precomputed data: latents and conditions in safetensors shards.

A directory contains `index.json`, `null.safetensors` with the condition of the empty prompt, and the shards of each split,
`train-00000.safetensors` and so on. A shard covers a fixed range of sample indices of the source data set. The range does not
depend on the process that writes the shard, or on the time. A shard omits broken samples, and its index entry lists them.

The header of a shard has a CRC-32 for each sample, which is compared whenever the sample is read. Nothing is pickled.
"""

import hashlib
import json
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_distill.errors import DamagedFileError
from lightning_distill.outputs import atomic_file
from lightning_distill.teachers.model_adapter import Condition

NULL = "null.safetensors"
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
    sizes, dtypes, checksums = [], {}, []
    for sample in samples:
        size = "" if sample.latents is None else "x".join(map(str, sample.latents.shape[1:]))
        sizes.append(size)
        latents = {} if sample.latents is None else {f"{_LATENTS}{size}": sample.latents}
        values = {**latents, **{f"{_CONDITION}{name}": value for name, value in sample.condition.items()}}
        for name, value in values.items():
            dtypes[name] = str(value.dtype).removeprefix("torch.")
            lowered = value.is_floating_point() and value.itemsize > dtype.itemsize
            columns[name].append(value.to(dtype) if lowered else value)
        checksums.append(_checksum(sample.prompt, ((name, dtypes[name], columns[name][-1]) for name in values)))
    header = {
        "prompts": [sample.prompt for sample in samples],
        "sizes": sizes,
        "dtypes": dtypes,
        "checksums": checksums,
    }
    tensors = {name: torch.stack(values).contiguous() for name, values in columns.items()}
    content = save(tensors, {_HEADER: json.dumps(header)})
    with atomic_file(path) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest(), len(content)


def _checksum(prompt: str, values: Iterable[tuple[str, str, Tensor]]) -> int:
    """CRC-32 of a sample: its prompt, and names, dtypes and stored bytes of its tensors."""
    checksum = zlib.crc32(prompt.encode(errors="surrogatepass"))
    for name, dtype, value in values:
        checksum = zlib.crc32(f"{name} {dtype}".encode(), checksum)
        checksum = zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy().data, checksum)
    return checksum


def damaged_error(path: Path, count: int = 1) -> DamagedFileError:
    """Error of a file that is missing or damaged, perhaps the first of several."""
    more = f", as are {count - 1} other files of its directory" if count > 1 else ""
    return DamagedFileError(f"{path} is missing or damaged{more}; delete it and run the same `precompute` again to rewrite it")


# What reading a damaged file can raise: invalid values in its header, or a header that does not fit its tensors.
_DAMAGE = (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError, RecursionError)


class _OpenShard:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = safe_open(path, framework="pt")
            header = json.loads(self.file.metadata()[_HEADER])
            self.prompts: list[str] = header["prompts"]
            self.checksums: list[int] = header["checksums"]
            self.dtypes: dict[str, str] = header["dtypes"]
            self.names = [name for name in self.dtypes if name.startswith(_CONDITION)]
            # A file stacks latents of one size into one tensor, in sample order.
            self.latents: list[tuple[str, int]] = []
            rows: defaultdict[str, int] = defaultdict(int)
            for size in header["sizes"]:
                self.latents.append((f"{_LATENTS}{size}" if size else "", rows[size]))
                rows[size] += 1
        except _DAMAGE as error:
            raise damaged_error(path) from error

    def read(self, row: int) -> EncodedSample:
        try:
            name, latents_row = self.latents[row]
            rows = {name: latents_row} if name else {}
            stored = {name: self._row(name, i) for name, i in {**rows, **dict.fromkeys(self.names, row)}.items()}
            checksum = _checksum(self.prompts[row], ((name, self.dtypes[name], value) for name, value in stored.items()))
            if checksum != self.checksums[row]:
                raise ValueError("the checksum differs")
            values = {name: value.to(getattr(torch, self.dtypes[name])) for name, value in stored.items()}
        except _DAMAGE as error:
            raise damaged_error(self.path) from error
        condition = {name.removeprefix(_CONDITION): values[name] for name in self.names}
        return EncodedSample(self.prompts[row], values[name] if name else None, condition)

    def _row(self, name: str, row: int) -> Tensor:
        value: Tensor = self.file.get_slice(name)[row]
        return value


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
