"""The weights of a network as they lie in files: read one at a time, or a part of one."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor


class StoredWeights:
    """Tensors of safetensors files, by name, of which no more is read than is asked for.

    Args:
        files: The file of each tensor.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    @classmethod
    def of_component(cls, directory: Path) -> "StoredWeights":
        """Of a model as diffusers and transformers save it: one file, or several with an index.

        Raises:
            FileNotFoundError: If there are no safetensors in it.
        """
        indices = sorted(directory.glob("*.safetensors.index.json"))
        if indices:
            places: dict[str, str] = json.loads(indices[0].read_text())["weight_map"]
            return cls({name: directory / file for name, file in places.items()})
        file = next((file for file in sorted(directory.glob("*.safetensors"))), None)
        if file is None:
            raise FileNotFoundError(f"there is no .safetensors file in {directory}")
        with safe_open(file, framework="pt") as tensors:
            return cls(dict.fromkeys(tensors.keys(), file))

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor in its stored dtype, on the CPU; of one with dimensions only the rows from start to stop.

        Raises:
            KeyError: If there is none of this name.
        """
        with safe_open(self._files[name], framework="pt") as tensors:
            part = tensors.get_slice(name)
            rows = part.get_shape()[:1]
            if not rows or (start == 0 and stop in (None, rows[0])):
                return tensors.get_tensor(name)
            return part[start:stop]
