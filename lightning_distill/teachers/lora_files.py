"""LoRA files, read by diffusers and peft: checks, and their updates of a transformer's weights."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn

from lightning_distill.errors import first_and_count
from lightning_distill.sharding.low_rank_update import LowRankUpdate
from lightning_distill.sharding.weight_files import WeightFilesError, safetensors_shapes
from lightning_distill.teachers.finite import first_non_finite
from lightning_distill.teachers.pipeline_source import PipelineSource
from lightning_distill.teachers.teacher_lora import TeacherLora

ADAPTER = "teacher"
"""Name of the LoRA in peft's layers."""
PREFIX = "transformer."
_FACTOR = re.compile(r"transformer\.(.+)\.lora_([AB])\.weight")
_TEXT_ENCODER = re.compile(r"(^|[._])(text_encoders?|lora_te\d?|text_model|text_projection|position_embedding)($|[._\d])")
_TOOLS = ("transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_", "base_model.model.")
"""Prefixes of the names of several tools; diffusers reads one kind of them in a file, and leaves out the others."""


def read_updates(
    loras: Iterable[TeacherLora], pipeline: type[DiffusionPipeline], build_network: Callable[[], Any]
) -> dict[str, LowRankUpdate]:
    """Read LoRA files, and check them against the transformer.

    Args:
        loras: The files with their weights; their updates of the same weight are added.
        pipeline: Stock pipeline class, which converts the names of other tools.
        build_network: Builds the transformer on the meta device, in the dtypes in which it is loaded.

    Returns:
        The update of each weight by its name in the transformer.

    Raises:
        ConfigurationError: If a file is missing or damaged, is of another transformer or no LoRA, has weights that are not
            finite, or has updates of text encoders.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for lora in loras:
        network = build_network()
        dtypes = {name: parameter.dtype for name, parameter in network.named_parameters()}
        for name, (down, up) in _read_factors(lora, pipeline, network).items():
            found.setdefault(f"{name}.weight", []).append((down, lora.weight * up))
    return {
        name: LowRankUpdate(
            torch.cat([down for down, _ in factors]),
            torch.cat([up for _, up in factors], dim=1),
            dtypes[name],
        )
        for name, factors in found.items()
    }


def _read_factors(lora: TeacherLora, pipeline: type[DiffusionPipeline], network: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors A (rank, in) and B (out, rank) of each layer in float32, with alpha / rank in B."""
    source, file = lora.source, lora.file()
    _check_names(file, source)
    # Families without a loader of their own have the names of diffusers, as Sana's loader reads them.
    kind: Any = pipeline if hasattr(pipeline, "lora_state_dict") else SanaLoraLoaderMixin
    with source.loading("LoRA"):
        options = {"return_alphas": True, "return_lora_metadata": True, "use_safetensors": True}
        weights, *alphas, metadata = kind.lora_state_dict(str(file), **options)
        if not any(".lora_A." in name for name in weights):
            weights = convert_unet_state_dict_to_peft(weights)
    layers = _check_factors(weights, network, source)
    with source.loading("LoRA"):
        network.load_lora_adapter(
            weights,
            prefix=PREFIX.removesuffix("."),
            network_alphas=alphas[0] if alphas else None,
            metadata=metadata,
            adapter_name=ADAPTER,
            low_cpu_mem_usage=True,
        )
    factors = {}
    for name in layers:
        layer: Any = network.get_submodule(name)
        if not isinstance(layer, LoraLayer):
            raise source.error(f"whose updates of {name!r} are not read by diffusers; convert it to diffusers' names")
        # Of the layer only the scale is used: its weights have followed it to the meta device.
        down, up = (weights[f"{PREFIX}{name}.lora_{part}.weight"].float() for part in "AB")
        factors[name] = down, float(layer.scaling[ADAPTER]) * up.flatten(1)
    return factors


def _check_names(file: Path, source: PipelineSource) -> None:
    """Check the names in a file for what diffusers would leave out with a message of its log only."""
    try:
        names = list(safetensors_shapes(file))
    except WeightFilesError as error:
        raise source.error(f"which {error}") from error
    with safe_open(file, framework="pt") as tensors:
        if invalid := first_non_finite({name: tensors.get_tensor(name) for name in names}):
            raise source.error(f"whose {invalid} is NaN or infinite; export it again")
        # Several tools write zeros for what they have not trained.
        diffs = [name for name in names if name.endswith((".diff", ".diff_b")) and tensors.get_tensor(name).any()]
    if encoders := [name for name in names if _TEXT_ENCODER.search(name)]:
        raise source.error(
            f"which updates a text encoder by {first_and_count(encoders)}, but adapter.lora updates the transformer only; "
            "remove these weights from the file, or merge it into adapter.pretrained"
        )
    for kind, part in {"DoRA": r"dora_scale|lora_magnitude_vector", "LoKr": r"\.lokr_", "LoHa": r"\.hada_"}.items():
        if other := [name for name in names if re.search(part, name)]:
            raise source.error(
                f"which has {kind} weights such as {other[0]!r}, but adapter.lora reads LoRA only; merge it into "
                "adapter.pretrained"
            )
    if diffs:
        raise source.error(
            f"which has full updates such as {diffs[0]!r} besides LoRA, which diffusers does not read; merge it into "
            "adapter.pretrained"
        )
    tools = {next((prefix for prefix in _TOOLS if name.startswith(prefix)), ""): name for name in names}
    if len(tools) > 1:
        first, second, *_ = tools.values()
        raise source.error(
            f"which has names of several tools, such as {first!r} and {second!r}, and diffusers reads one kind only; "
            "convert it to diffusers' names"
        )


def _check_factors(weights: Mapping[str, Tensor], network: nn.Module, source: PipelineSource) -> list[str]:
    """Check that all weights are factors of layers of the transformer, and that their shapes fit; returns the layers."""
    modules, found = dict(network.named_modules()), {name: _FACTOR.fullmatch(name) for name in weights}
    layers = sorted({match[1] for match in found.values() if match})
    unknown = [name for name, match in found.items() if match is None or not _has_weight(modules.get(match[1]))]
    unpaired = [name for name in layers if any(f"{PREFIX}{name}.lora_{part}.weight" not in weights for part in "AB")]
    if unknown or not weights:
        clause = f"whose weight {first_and_count(unknown)} fits" if unknown else "which has no weight that fits"
        raise source.error(f"{clause} no layer of {type(network).__name__}; use LoRA that was trained on this teacher")
    if unpaired:
        raise source.error(f"which has one of two LoRA factors of {first_and_count(unpaired)}; download it again")
    for name in layers:
        weight: Any = modules[name].weight
        down, up = weights[f"{PREFIX}{name}.lora_A.weight"], weights[f"{PREFIX}{name}.lora_B.weight"]
        if (up.shape[0], *down.shape[1:]) != tuple(weight.shape) or down.shape[0] != up.shape[1]:
            raise source.error(
                f"whose factors of {name} have the shapes {tuple(down.shape)} and {tuple(up.shape)}, but the layer has "
                f"{tuple(weight.shape)}; use LoRA that was trained on this teacher"
            )
    return layers


def _has_weight(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)
