"""Weights of a network in safetensors files: reads one tensor, or some of its rows, at a time."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lightning_distill.sharding.low_rank_update import LowRankUpdate
from lightning_distill.sharding.weight_files import WeightFiles


class StoredWeights:
    """Tensors in safetensors files by name; a tensor is read on request only.

    Args:
        files: File of each tensor.
        stored_names: Name of a tensor in its file, where it differs.
        updates: Updates by the names of their tensors, added when a tensor is read.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        stored_names: Mapping[str, str] | None = None,
        updates: Mapping[str, LowRankUpdate] | None = None,
    ) -> None:
        self._files = files
        self._stored_names = stored_names or {}
        self._updates = updates or {}

    @classmethod
    def of_component(cls, directory: Path, variant: str | None = None) -> "StoredWeights":
        """The weights of a model as diffusers and transformers save it: one file, or several files with an index.

        Args:
            directory: Folder of the model.
            variant: Preferred variant of `choose_variant`.

        Raises:
            WeightFilesError: If the folder has no complete safetensors files.
        """
        found = WeightFiles.of_component(directory, variant)
        return cls({name: directory / file for file in found.files for name in found.tensors(file)})

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def renamed(self, names: Mapping[str, str]) -> "StoredWeights":
        """The same tensors under other names.

        Args:
            names: The present name of each new name.
        """
        stored_names = {new: self._stored_names.get(name, name) for new, name in names.items()}
        updates = {new: self._updates[name] for new, name in names.items() if name in self._updates}
        return StoredWeights({new: self._files[name] for new, name in names.items()}, stored_names, updates)

    def updated(self, updates: Mapping[str, LowRankUpdate]) -> "StoredWeights":
        """The same tensors with updates, which are added to the rows that are read.

        Raises:
            KeyError: If there is no tensor of an update's name.
        """
        if missing := [name for name in updates if name not in self]:
            raise KeyError(missing[0])
        return StoredWeights(self._files, self._stored_names, updates)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor on the CPU, in its stored dtype or that of its update; with dimensions only rows `start` to `stop`.

        Raises:
            KeyError: If there is no tensor of this name.
        """
        stored = self._read(name, start, stop)
        update = self._updates.get(name)
        return stored if update is None else update.added_to(stored, start)

    def _read(self, name: str, start: int, stop: int | None) -> Tensor:
        with safe_open(self._files[name], framework="pt") as tensors:
            stored_name = self._stored_names.get(name, name)
            tensor = tensors.get_slice(stored_name)
            rows = tensor.get_shape()[:1]
            if not rows or (start == 0 and stop in (None, rows[0])):
                return tensors.get_tensor(stored_name)
            return tensor[start:stop]
