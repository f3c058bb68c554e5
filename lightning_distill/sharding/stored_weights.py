"""The weights of a network as they lie in files: read one at a time, or a part of one."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor


class StoredWeights:
    """Tensors of safetensors files, by name, of which no more is read than is asked for.

    Args:
        files: The file of each tensor.
        places: Name in its file of each tensor that has another there.
    """

    def __init__(self, files: Mapping[str, Path], places: Mapping[str, str] | None = None) -> None:
        self._files = files
        self._places = places or {}

    @classmethod
    def of_component(cls, directory: Path) -> "StoredWeights":
        """Of a model as diffusers and transformers save it: one file, or several with an index; no variants, as `.fp16.`.

        Raises:
            FileNotFoundError: If there are no safetensors in it.
        """
        indices = _plain_first(directory.glob("*.safetensors.index.json"))
        if indices:
            places: dict[str, str] = json.loads(indices[0].read_text())["weight_map"]
            return cls({name: directory / file for name, file in places.items()})
        files = _plain_first(directory.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"there is no .safetensors file in {directory}")
        file = files[0]
        with safe_open(file, framework="pt") as tensors:
            return cls(dict.fromkeys(tensors.keys(), file))

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._files)

    def renamed(self, places: Mapping[str, str]) -> "StoredWeights":
        """The same tensors by other names.

        Args:
            places: Present names by new ones.
        """
        stored = {name: self._places.get(place, place) for name, place in places.items()}
        return StoredWeights({name: self._files[place] for name, place in places.items()}, stored)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor in its stored dtype, on the CPU; of one with dimensions only the rows from start to stop.

        Raises:
            KeyError: If there is none of this name.
        """
        with safe_open(self._files[name], framework="pt") as tensors:
            place = self._places.get(name, name)
            part = tensors.get_slice(place)
            rows = part.get_shape()[:1]
            if not rows or (start == 0 and stop in (None, rows[0])):
                return tensors.get_tensor(place)
            return part[start:stop]


def _plain_first(files: Iterable[Path]) -> list[Path]:
    """By name, variants last: they have one more word between dots."""
    return sorted(files, key=lambda file: (file.name.count("."), file.name))
