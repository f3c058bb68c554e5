"""Files with the weights of a model, as diffusers and transformers name them: which there are, and whether they are whole."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

_SINGLE = re.compile(r"(diffusion_pytorch_model|model)(?:\.([\w-]+))?\.safetensors")
_INDEX = re.compile(r"(diffusion_pytorch_model|model)\.safetensors\.index(?:\.([\w-]+))?\.json")
_PART = re.compile(r"-\d+-of-\d+\.")
_PICKLED = (".bin", ".bin.index.json", ".pt", ".pth", ".ckpt")
_LFS_POINTER = b"version https://git-lfs"


class WeightFilesError(ValueError):
    """Files of weights that are missing or damaged. The message is a clause that follows the name of the model."""


def choose_variant(names: Iterable[str], variant: str | None = None) -> str | None:
    """Choose the variant of a model's weights, such as "fp16" in `model.fp16.safetensors`.

    Args:
        names: Names of the files in the folder of the model.
        variant: Preferred variant; a model without it is loaded without variant.

    Returns:
        The preferred variant if there is one. Otherwise None for files without variant, or the only variant.

    Raises:
        WeightFilesError: If there are no safetensors files, or several variants without a preference.
    """
    listed = [name for name in names if not _PART.search(name)]
    matches = [match for name in listed if (match := _SINGLE.fullmatch(name) or _INDEX.fullmatch(name))]
    variants = {match[2] for match in matches}
    if variant in variants:
        return variant
    if None in variants:
        return None
    if len(variants) == 1:
        return next(iter(variants))
    if variants:
        raise WeightFilesError(f"has the variants {', '.join(sorted(map(str, variants)))}; set variant to one of them")
    if pickled := sorted(name for name in listed if name.endswith(_PICKLED)):
        raise WeightFilesError(
            f"has {pickled[0]} and no safetensors file, and pickled weights are not loaded; convert it to safetensors"
        )
    raise WeightFilesError("has no weights (.safetensors); download it again")


@dataclass(frozen=True)
class WeightFiles:
    """Files of the weights of a model.

    Attributes:
        directory: Folder of the files.
        files: Names of the tensors of each file by the file's name, or None for all tensors of a single file.
        variant: Variant in their names, or None.
    """

    directory: Path
    files: dict[str, list[str] | None]
    variant: str | None

    @classmethod
    def of_component(cls, directory: Path, variant: str | None = None) -> "WeightFiles":
        """Find the weights of a model: one file, or several files with an index.

        Args:
            directory: Folder of the model.
            variant: Preferred variant of `choose_variant`.

        Raises:
            WeightFilesError: If there are no safetensors files, or their index is damaged.
        """
        names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
        chosen = choose_variant(names, variant)
        found = [name for name in names for pattern in (_SINGLE, _INDEX) if _has_variant(pattern.fullmatch(name), chosen)]
        # Each library prefers one of the two if a folder has both: diffusers the index, transformers the single file.
        index_first = any(name.startswith("diffusion_pytorch_model") for name in found)
        name = sorted(found, key=lambda each: each.endswith(".json") != index_first)[0]
        if not name.endswith(".json"):
            return cls(directory, {name: None}, chosen)
        files: dict[str, list[str] | None] = {}
        for tensor, file in _read_index(directory / name).items():
            files[file] = [*(files.get(file) or []), tensor]
        return cls(directory, files, chosen)

    def tensors(self, file: str) -> list[str]:
        """Names of the tensors of a file.

        Raises:
            WeightFilesError: If they are not in an index, and the file is not a complete safetensors file.
        """
        listed = self.files[file]
        return list(safetensors_shapes(self.directory / file)) if listed is None else listed

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name, from the headers of the files, which are checked against the files' sizes.

        Raises:
            WeightFilesError: If a file is missing, empty, incomplete or damaged, or lacks a tensor of the index.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for name, tensors in self.files.items():
            found = safetensors_shapes(self.directory / name)
            if missing := [tensor for tensor in tensors or () if tensor not in found]:
                raise WeightFilesError(f"has {name} without {missing[0]}, which its index names; download it again")
            shapes |= found
        return shapes


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a safetensors file by name.

    Raises:
        WeightFilesError: If the file is missing, or not a complete safetensors file.
    """
    check_whole(path)
    try:
        with safe_open(path, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise WeightFilesError(f"has an incomplete or damaged {path.name} ({error}); download it again") from error


def check_whole(path: Path) -> None:
    """Check that a file exists, is not empty, and is not a git-lfs pointer to its content.

    Raises:
        WeightFilesError: If not.
    """
    if not path.is_file():
        raise WeightFilesError(f"lacks {path.name}; download it again")
    if not path.stat().st_size:
        raise WeightFilesError(f"has an empty {path.name}; download it again")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise WeightFilesError(f"has a git-lfs pointer in place of {path.name}; run `git lfs pull`")


def _has_variant(match: re.Match[str] | None, variant: str | None) -> bool:
    return match is not None and match[2] == variant


def _read_index(path: Path) -> dict[str, str]:
    """File of each tensor."""
    try:
        weight_map: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
        plain = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightFilesError(f"has a {path.name} that cannot be read; download it again") from error
    if not names or not plain:
        raise WeightFilesError(f"has a {path.name} that names no files, or files outside its folder; download it again")
    return weight_map
