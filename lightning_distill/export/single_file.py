"""Transformer of a student as one safetensors file in its family's original layout, for `from_single_file` and ComfyUI."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor

from lightning_distill.errors import ConfigurationError, first_and_count
from lightning_distill.export.original.families import LAYOUTS
from lightning_distill.export.original.layout import swap_halves
from lightning_distill.outputs import atomic_file

Read = Callable[[Iterable[str]], dict[str, Tensor]]
"""Reads the tensors of the given names; they may be flattened."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class Source(NamedTuple):
    """Weights of one tensor of the original layout.

    Attributes:
        names: Names in diffusers, in the order in which they are concatenated.
        swapped: Whether the halves of the first dimension are exchanged.
    """

    names: list[str]
    swapped: bool


def plan_single_file(weights: Mapping[str, Tensor], transformer: str, config: Mapping[str, Any]) -> dict[str, Source]:
    """Source of every tensor of a family's original layout, checked against the reader of diffusers.

    Args:
        weights: Weights of the stock transformer; they give names and shapes, and may be on the meta device.
        transformer: Name of diffusers' class of the transformer.
        config: Configuration of the transformer.

    Raises:
        ConfigurationError: If diffusers has no reader for the class, or cannot read this configuration back.
    """
    if transformer not in LAYOUTS or transformer not in SINGLE_FILE_LOADABLE_CLASSES:
        raise _refusal(transformer, "diffusers cannot read a single file of this class")
    layout = LAYOUTS[transformer]
    places = layout.parameters(weights)
    if unknown := sorted(weights.keys() - places.keys()):
        raise _refusal(transformer, f"its original layout has no {first_and_count(unknown)}")
    parts: dict[str, dict[int, str]] = {}
    for name, place in places.items():
        parts.setdefault(place.name, {})[place.position] = name
    plan = {
        original: Source([names[position] for position in sorted(names)], places[names[min(names)]].swapped)
        for original, names in parts.items()
    }
    reader = SINGLE_FILE_LOADABLE_CLASSES[transformer]["checkpoint_mapping_fn"]
    written = _shapes(plan, weights) | layout.placeholders(weights)
    try:
        found = reader(checkpoint=written, config=dict(config))
    except (RuntimeError, LookupError, ValueError) as error:
        cause = str(error).partition("\n")[0]
        raise _refusal(transformer, f"the reader of diffusers does not fit these sizes ({cause})") from error
    read = {name: value.shape for name, value in found.items()}
    if wrong := sorted(name for name, value in weights.items() if read.get(name) != value.shape):
        raise _refusal(transformer, f"the reader of diffusers does not give back {first_and_count(wrong)}")
    return plan


def original_tensors(plan: Mapping[str, Source], weights: Mapping[str, Tensor], read: Read) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the original layout, one at a time, in the order of the plan.

    Args:
        plan: Result of `plan_single_file`.
        weights: Weights that give shapes; they may be on the meta device.
        read: Reads weights.
    """
    for name, source in plan.items():
        values = read(source.names)
        yield name, _assemble(source, {each: values[each].reshape(weights[each].shape) for each in source.names})


def save_single_file(
    weights: Mapping[str, Tensor], read: Read, transformer: str, config: Mapping[str, Any], file: Path
) -> None:
    """Write a stock transformer in its family's original layout; one tensor at a time is in memory.

    Args:
        weights: Weights of the stock transformer; they give names, shapes and dtypes, and may be on the meta device.
        read: Reads weights.
        transformer: Name of diffusers' class of the transformer.
        config: Configuration of the transformer.
        file: Output file.

    Raises:
        ConfigurationError: If diffusers cannot read the file back.
        StorageError: If the disk is full or fails.
    """
    plan = plan_single_file(weights, transformer, config)
    placeholders = LAYOUTS[transformer].placeholders(weights)
    outputs = _shapes(plan, weights) | placeholders

    def tensors() -> Iterator[Tensor]:
        yield from (value for _, value in original_tensors(plan, weights, read))
        yield from placeholders.values()

    _write(outputs, tensors(), file)


def _shapes(plan: Mapping[str, Source], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the original layout on the meta device."""
    shapes = {name: value.to("meta") for name, value in weights.items()}
    return {name: _assemble(source, shapes) for name, source in plan.items()}


def _assemble(source: Source, weights: Mapping[str, Tensor]) -> Tensor:
    parts = [weights[name] for name in source.names]
    value = torch.cat(parts) if len(parts) > 1 else parts[0]
    return swap_halves(value) if source.swapped else value


def _write(outputs: Mapping[str, Tensor], tensors: Iterator[Tensor], file: Path) -> None:
    """Write the safetensors format: length of the header, header, and the bytes of the tensors in the order of `outputs`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in outputs.items():
        start, end = end, end + value.nbytes
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    with atomic_file(file) as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for value in tensors:
            output.write(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _refusal(transformer: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"format single_file is not possible for {transformer}: {reason}; export the format stock")
