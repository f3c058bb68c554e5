"""Reading of sharded checkpoints without their code: torch unpickles index and values without restriction."""

import io
import pickle
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, ReadItem, filesystem, metadata
from torch.serialization import _get_layout

from lightning_distill.errors import ConfigurationError
from lightning_distill.sharding.checkpoint_files import METADATA, first_line

_SAFE_CLASSES = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        torch.Size,
        PosixPath,
        PurePosixPath,
        _get_layout,
    )
}


class ShardReader(FileSystemReader):
    """Reader of sharded directories that unpickles the classes of the format only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """The index of the shards.

        Raises:
            ConfigurationError: If it has another class, or names a file outside the directory.
        """
        content = (Path(self.path) / METADATA).read_bytes()
        try:
            found = _SafeUnpickler(io.BytesIO(content)).load()
            if not isinstance(found, metadata.Metadata) or not isinstance(found.storage_data, dict):
                raise pickle.UnpicklingError("it is not an index of shards")
            files = {str(info.relative_path) for info in found.storage_data.values()}
            if outside := [name for name in files if Path(name).name != name]:
                raise pickle.UnpicklingError(f"it names the file {outside[0]!r} elsewhere")
        except Exception as error:  # a pickle of others can raise any exception
            raise ConfigurationError(
                f"ckpt_path {str(self.path)!r} cannot be read: its {METADATA} is damaged or was not written by fit "
                f"({first_line(error)}); set it to another checkpoint"
            ) from error
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        if (module, name) not in _SAFE_CLASSES:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return _SAFE_CLASSES[module, name]


class _SafePlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # torch unpickles these bytes without restriction.
        safe = io.BytesIO()
        torch.save(torch.load(value, map_location="cpu", weights_only=True), safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)


def load_shards(state: dict[str, Any], path: Path, no_dist: bool = False) -> None:
    """Read a sharded directory into tensors and values, in place, like `torch.distributed.checkpoint.load`.

    Args:
        state: Nested dict of what to read.
        path: The directory.
        no_dist: Whether this process reads alone.

    Raises:
        ConfigurationError: If it cannot be read.
    """
    try:
        dcp.load(state, storage_reader=ShardReader(path), planner=_SafePlanner(), no_dist=no_dist)
    except dcp.api.CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        if isinstance(first, ConfigurationError):
            raise first from error
        raise ConfigurationError(
            f"ckpt_path {str(path)!r} cannot be read ({first_line(first)}); set it to another checkpoint"
        ) from error
