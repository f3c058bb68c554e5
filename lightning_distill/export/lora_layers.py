"""LoRA of a student for stock networks: its factors by layer, and the file that diffusers loads."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor, nn

from lightning_distill.students.lora_student import ADAPTER, LORA_WEIGHTS, PREFIX, lora_layers

LoraLayers = dict[str, tuple[Tensor, Tensor]]
"""Factors A (rank, in) and B (out, rank) by the name of a linear layer in the stock network; its update is B A."""


def lora_layers_of(student: nn.Module) -> LoraLayers:
    r"""LoRA of a student, in float32; the scale :math:`\alpha / r` of each layer is part of its B.

    Args:
        student: A network with LoRA.

    Returns:
        Factors by layer, on the CPU; empty for a student without LoRA.
    """
    layers: LoraLayers = {}
    for name, layer in lora_layers(student).items():
        a, b = (factors[ADAPTER].weight.detach().cpu().float() for factors in (layer.lora_A, layer.lora_B))
        layers[name] = (a, b * layer.scaling[ADAPTER])
    return layers


def save_lora_file(layers: Mapping[str, tuple[Tensor, Tensor]], directory: Path) -> Path:
    """Write a LoRA in diffusers' format, for `load_lora_weights` of a pipeline or `load_lora_adapter` of a transformer.

    Args:
        layers: Factors by layer; their ranks may differ.
        directory: Output directory; created if it does not exist.

    Returns:
        The file, `pytorch_lora_weights.safetensors`. Its header has the configuration of the adapter: without it, a reader may
        scale layers of a rare rank by the most frequent rank.
    """
    LoraBaseMixin.write_lora_layers(
        state_dict=dict(_diffusers_weights(layers)),
        save_directory=str(directory),
        is_main_process=True,
        weight_name=LORA_WEIGHTS,
        save_function=None,
        safe_serialization=True,
        lora_adapter_metadata={f"{PREFIX}{name}": value for name, value in adapter_config(layers).items()},
    )
    return directory / LORA_WEIGHTS


def adapter_config(layers: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Arguments of peft's `LoraConfig` that give each layer its rank and the scale 1.

    peft also matches a plain name as the end of longer names, such as `proj_out` in `blocks.0.proj_out`. These patterns match
    complete names.

    Args:
        layers: Factors by layer, at least one.
    """
    ranks = {name: len(a) for name, (a, _) in layers.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": "|".join(map(re.escape, ranks)),
    }


def _diffusers_weights(layers: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, (a, b) in layers.items():
        yield f"{PREFIX}{name}.lora_A.weight", a.contiguous()
        yield f"{PREFIX}{name}.lora_B.weight", b.contiguous()
