"""LoRA files under the key names of ComfyUI and of kohya's trainers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.export.lora_layers import LoraLayers
from lightning_distill.export.original.families import LAYOUTS
from lightning_distill.export.original.layout import Layout, Place, swap_halves

Tool = Literal["comfyui", "kohya"]
"""Tools with key names of their own: ComfyUI; and sd-scripts and musubi-tuner by kohya, whose files Forge and others read."""


class Factors(NamedTuple):
    """Names of the two factors."""

    a: str
    b: str


_LORA_A_B = Factors("lora_A", "lora_B")
_SAME = Layout(keeps_others=True)
_DOWN_UP = Factors("lora_down", "lora_up")


@dataclass(frozen=True)
class ToolKeys:
    """Key names of a tool for a family.

    Attributes:
        layout: Original layout of the tool's network; by default it has diffusers' names.
        prefix: Prefix of all keys.
        separator: What separates the parts of a layer's name.
        factors: Names of the factors.
        has_alpha: Whether the readers take a scale `alpha` of each layer. The scale is 1 without it.
        unread: Original layers that readers of these keys drop.
        widths: Outputs of the first part of a fused layer, where the reader of diffusers has a fixed one.
        note: What users of the file have to know.
    """

    layout: Layout = _SAME
    prefix: str = "diffusion_model."
    separator: Literal[".", "_"] = "."
    factors: Factors = _DOWN_UP
    has_alpha: bool = True
    unread: frozenset[str] = frozenset()
    widths: Mapping[str, int] = field(default_factory=dict)
    note: str = ""


_Parts = dict[int, tuple[Place, Tensor, Tensor]]
"""Place and factors of each part of a fused layer by its position."""

_kohya = partial(ToolKeys, prefix="lora_unet_", separator="_")
_FLUX, _FLUX_2 = LAYOUTS["FluxTransformer2DModel"], LAYOUTS["Flux2Transformer2DModel"]
_FLUX_WIDTHS = {"linear1": 3072}
_FLUX_NOTE = "diffusers drops the time embedder of FLUX.1 from files with these keys; load the format `lora` in diffusers."
_Z_IMAGE_NOTE = "ComfyUI drops attention layers of Z-Image from files with these keys; load the format `comfyui` in ComfyUI."

TOOL_KEYS: dict[str, dict[Tool, ToolKeys]] = {
    "FluxTransformer2DModel": {
        "comfyui": ToolKeys(layout=_FLUX, widths=_FLUX_WIDTHS, note=_FLUX_NOTE),
        "kohya": _kohya(layout=_FLUX, widths=_FLUX_WIDTHS, note=_FLUX_NOTE),
    },
    "Flux2Transformer2DModel": {
        "comfyui": ToolKeys(layout=_FLUX_2, factors=_LORA_A_B, has_alpha=False),
        "kohya": _kohya(
            layout=_FLUX_2,
            unread=frozenset(
                {
                    "final_layer.adaLN_modulation.1",
                    "guidance_in.in_layer",
                    "guidance_in.out_layer",
                    "double_stream_modulation_img.lin",
                    "double_stream_modulation_txt.lin",
                    "single_stream_modulation.lin",
                }
            ),
        ),
    },
    "QwenImageTransformer2DModel": {"comfyui": ToolKeys(), "kohya": _kohya()},
    # ComfyUI maps diffusers' names of SD3 to its own (`mmdit_to_diffusers` in comfy/utils.py).
    "SD3Transformer2DModel": {"comfyui": ToolKeys(prefix="transformer.", factors=_LORA_A_B, has_alpha=False)},
    # ComfyUI does so for Z-Image as well (`z_image_to_diffusers`). musubi-tuner has diffusers' names.
    "ZImageTransformer2DModel": {"comfyui": ToolKeys(), "kohya": _kohya(note=_Z_IMAGE_NOTE)},
}
"""Key names by the class of the transformer in diffusers, for every tool whose files diffusers can read back.

Files for ComfyUI follow comfy/lora.py (`model_lora_keys_unet`). The readers of diffusers 0.42 differ from the tools twice.
From files of FLUX.1 they drop layers outside of the blocks, whose names lack a prefix. In ComfyUI files of FLUX.2 they take the
shift of the output layer for its scale.
"""


def tool_keys(transformer: str, tool: Tool) -> ToolKeys:
    """Key names of a tool for a family.

    Args:
        transformer: Name of diffusers' class of the transformer.
        tool: The tool.

    Raises:
        ConfigurationError: If diffusers has no reader for such files.
    """
    keys = TOOL_KEYS.get(transformer, {}).get(tool)
    if keys is None:
        raise ConfigurationError(
            f"format {tool} is not possible for {transformer}: diffusers has no reader that would check the file; export the "
            "format lora"
        )
    return keys


def tool_lora(layers: Mapping[str, tuple[Tensor, Tensor]], transformer: str, tool: Tool) -> dict[str, Tensor]:
    """Weights of a LoRA under the key names of a tool.

    A layer that is fused in the tool's network has the ranks of its parts in sum: A is stacked, and B is block-diagonal.

    Args:
        layers: Factors by layer.
        transformer: Name of diffusers' class of the transformer.
        tool: The tool.

    Raises:
        ConfigurationError: If diffusers has no reader for such files, or the reader lacks one of the layers.
    """
    keys = tool_keys(transformer, tool)
    places = keys.layout.layers(layers)
    unread = [name for name in layers if name not in places or places[name].name in keys.unread]
    if unread:
        raise ConfigurationError(
            f"format {tool} is not possible for {transformer}: there is no key for the layer {unread[0]}; export the format "
            "lora, or train LoRA on other layers"
        )
    parts: dict[str, _Parts] = {}
    for name, place in places.items():
        a, b = layers[name]
        parts.setdefault(place.name, {})[place.position] = (place, a, swap_halves(b) if place.swapped else b)
    state: dict[str, Tensor] = {}
    for original, group in parts.items():
        a, b = _fuse(original, group, keys, f"format {tool} is not possible for {transformer}")
        key = keys.prefix + original.replace(".", keys.separator)
        state[f"{key}.{keys.factors.a}.weight"] = a.contiguous()
        state[f"{key}.{keys.factors.b}.weight"] = b.contiguous()
        if keys.has_alpha:
            state[f"{key}.alpha"] = torch.tensor(float(len(a)))
    return state


def check_tool_lora(outputs: Mapping[str, int], transformer: str, tool: Tool) -> None:
    """Check that `tool_lora` is possible, before there are weights.

    Args:
        outputs: Number of outputs of each layer with LoRA.
        transformer: Name of diffusers' class of the transformer.
        tool: The tool.

    Raises:
        ConfigurationError: If diffusers has no reader for such files, or the reader lacks one of the layers.
    """
    factors = {
        name: (torch.empty(1, 1, device="meta"), torch.empty(count, 1, device="meta")) for name, count in outputs.items()
    }
    tool_lora(factors, transformer, tool)


def save_tool_lora(layers: LoraLayers, transformer: str, tool: Tool, file: Path) -> None:
    """Write a LoRA under the key names of a tool.

    Args:
        layers: Factors by layer.
        transformer: Name of diffusers' class of the transformer.
        tool: The tool.
        file: Output file; its directory has to exist.

    Raises:
        ConfigurationError: If diffusers has no reader for such files, or the reader lacks one of the layers.
    """
    save_file(tool_lora(layers, transformer, tool), file, {"format": "pt"})


def _fuse(original: str, group: _Parts, keys: ToolKeys, problem: str) -> tuple[Tensor, Tensor]:
    """Factors of a fused layer; parts without LoRA have rows of zeros in B."""
    sizes = next(iter(group.values()))[0].sizes
    factors = {index: (a, b) for index, (_, a, b) in sorted(group.items())}
    units = {len(b) / sizes[index] for index, (_, b) in factors.items()}
    width = keys.widths.get(original.rpartition(".")[2])
    if len(units) > 1 or (width and units != {width}):
        raise ConfigurationError(
            f"{problem}: {original} fuses layers of {width or 'equal'} outputs each, up to a fixed factor, and these have "
            f"{', '.join(str(len(b)) for _, b in factors.values())}; export the format lora"
        )
    unit = int(units.pop())
    rank = sum(len(a) for a, _ in factors.values())
    fused = factors[min(factors)][1].new_zeros(unit * sum(sizes), rank)
    column = 0
    for index, (a, b) in factors.items():
        row = unit * sum(sizes[:index])
        fused[row : row + len(b), column : column + len(a)] = b
        column += len(a)
    return torch.cat([a for a, _ in factors.values()]), fused
