"""LoRA students (arXiv 2106.09685): a few trained weights and time embedders on the frozen weights of another network.

Every student that is exported without its base contains a copy of this file. It imports only torch, diffusers, peft and sibling
files, and runs without this package.
"""

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from .few_step import FewStepPipeline
from .few_step_components import student_pipeline
from .two_time import StudentOnlyModule, TwoTimeModel

ADAPTER = "default"
"""Adapter name of the weights in peft's layers."""
SETTINGS = "student.json"
"""Settings file in a directory that `load_lora_student` reads: what base the student needs, and the student's configuration."""
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
"""LoRA weights in that directory, under diffusers' names."""
TIME_WEIGHTS = "time_embedders.safetensors"
"""Student-only weights in that directory: time embedders, and the grid of a policy."""
PREFIX = "transformer."
"""Prefix of diffusers for the names of a transformer's LoRA weights."""


def build_on_shared_weights(base: nn.Module, network_class: type[TwoTimeModel], config: dict[str, Any]) -> TwoTimeModel:
    """Build a network that shares all parameters with a base network, except for its student-only modules.

    Shared parameters are the same objects in both networks. Student-only modules are the time embedders and, with a policy, its
    grid; a network without an interval input shares the time embedders as well.

    Args:
        base: Two-time or stock network with parameters of the same names. Its buffers are shared as well.
        network_class: Class of the new network.
        config: Configuration of the new network.

    Returns:
        The network, on the base's device. Its student-only modules are newly initialised, in float32.

    Raises:
        ValueError: If the base lacks a parameter or a buffer, or has it in another shape.
    """
    with init_empty_weights(include_buffers=False):
        network = network_class.from_config(config)
    prefixes = student_only_prefixes(network)
    for part in student_only_modules(network).values():
        part.to_empty(device=next(base.parameters()).device)
        for layer in (each for each in part.modules() if isinstance(each, nn.Linear)):
            layer.reset_parameters()
    shared: dict[str, Tensor] = dict([*base.named_parameters(), *base.named_buffers()])
    for name, empty in [*network.named_parameters(), *network.named_buffers()]:
        if name.startswith(prefixes):
            continue
        if name not in shared or shared[name].shape != empty.shape:
            raise ValueError(
                f"the base has no {name} of shape {tuple(empty.shape)}; pass the base that the student was trained on"
            )
        path, _, attribute = name.rpartition(".")
        parent = network.get_submodule(path)
        setattr(parent, attribute, shared[name])
        if attribute in parent._buffers:
            parent._non_persistent_buffers_set.add(attribute)  # the base saves it
    return network


def student_only_modules(network: nn.Module) -> dict[str, nn.Module]:
    """Modules of a student in addition to its teacher's weights, by name: `time_modules`, or none for a stock network."""
    return {} if isinstance(network, TwoTimeModel) and network.is_stock else time_modules(network)


def time_modules(network: nn.Module) -> dict[str, nn.Module]:
    """Time embedders, and a policy's grid, by name."""
    return {name: network.get_submodule(name) for name, part in network.named_modules() if isinstance(part, StudentOnlyModule)}


def student_only_prefixes(network: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of student-only weights."""
    return tuple(f"{name}." for name in student_only_modules(network))


def lora_modules(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Linear layers inside a network's stacks of blocks whose names end in one of `targets`.

    Args:
        network: Transformer; its weights are not read.
        targets: Name suffixes, such as "to_q" or "ff.net.2".

    Raises:
        ValueError: If a target matches no layer.
    """
    linear = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    found: dict[str, list[str]] = {}
    for target in targets:
        # Blocks are numbered: this finds `proj_out` of a block, but not the network's last layer of that name.
        blocks = [name.removesuffix(f".{target}").split(".") if name.endswith(f".{target}") else [] for name in linear]
        found[target] = [name for name, path in zip(linear, blocks, strict=True) if any(part.isdigit() for part in path)]
        if not found[target]:
            raise ValueError(f"no linear layer of a block of {type(network).__name__} ends in {target!r}")
    chosen = {name for names in found.values() for name in names}
    return [name for name in linear if name in chosen]


def add_lora(network: TwoTimeModel, config: LoraConfig) -> TwoTimeModel:
    """Add low-rank updates, in float32 and without initial effect; only they and student-only modules are trainable."""
    inject_adapter_in_model(config, network, ADAPTER)
    # peft uses the base's precision, but bfloat16 would round most of an update away.
    cast_training_params(network, torch.float32)
    for part in student_only_modules(network).values():
        part.requires_grad_(True)
    return network


def lora_layers(network: nn.Module) -> dict[str, LoraLayer]:
    """LoRA layers of a network, by name."""
    return {name: part for name, part in network.named_modules() if isinstance(part, LoraLayer)}


def lora_weights(network: TwoTimeModel) -> dict[str, Tensor]:
    """LoRA weights under peft's names, such as `transformer_blocks.0.attn.to_q.lora_A.weight`."""
    state: dict[str, Tensor] = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    return state


def time_weights(network: TwoTimeModel) -> dict[str, Tensor]:
    """Student-only weights, of the time embedders and of a policy's grid, by their names in the network."""
    prefixes = student_only_prefixes(network)
    return {name: value for name, value in network.state_dict().items() if name.startswith(prefixes)}


@torch.no_grad()
def merge_lora_weights(network: TwoTimeModel) -> TwoTimeModel:
    """Network with merged LoRA updates, :math:`W + s B A` in place of every LoRA layer, in float32 on the CPU.

    This makes a single copy. In bfloat16 the updates, which are small compared with the weights, would mostly be rounded away.
    """
    state: dict[str, Tensor] = {}
    layers = lora_layers(network)
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        parent, _, attribute = name.rpartition(".")
        if f".{ADAPTER}" in name:
            continue
        value = value.detach().to("cpu", torch.float32, copy=True) if value.is_floating_point() else value.cpu()
        if parent.endswith(".base_layer"):
            parent = parent.removesuffix(".base_layer")
            if attribute == "weight":
                value += layers[parent].get_delta_weight(ADAPTER).to("cpu", torch.float32)
        state[f"{parent}.{attribute}" if parent else attribute] = value
    with init_empty_weights(include_buffers=False):
        plain = type(network).from_config({key: value for key, value in network.config.items() if not key.startswith("_")})
    expected = plain.state_dict().keys()  # excludes buffers that are never saved
    plain.load_state_dict({name: value for name, value in state.items() if name in expected}, assign=True)
    return plain.eval()


def base_sample(network: nn.Module, layers: Sequence[str]) -> list[float]:
    """First weights of some layers of a network, which identify it among networks of the same shapes."""
    sample: list[float] = []
    for name in layers:
        weight = network.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        sample += weight.flatten()[:4].tolist()
    return sample


def load_lora_student(base: DiffusionPipeline, directory: str | Path) -> FewStepPipeline:
    """Load a student that was exported without its base; it shares the base's weights.

    Args:
        base: Stock pipeline that the student was trained on, in any precision. It is unchanged, and still usable.
        directory: Directory of the export.

    Returns:
        Pipeline that generates images in a few steps.

    Raises:
        ValueError: If the student was trained on another base, or the directory's weights do not match its settings.
    """
    directory = Path(directory)
    settings = json.loads((directory / SETTINGS).read_text())
    module, kind = settings["pipeline"]
    family: type[FewStepPipeline] = getattr(import_module(f".{module}", __package__), kind)
    if not isinstance(base, family.stock_class):
        raise ValueError(
            f"this student's base is a {family.stock_class.__name__}, not a {type(base).__name__}; pass its own base"
        )
    config = settings["transformer"]
    base_config = base.transformer.config
    if differing := [
        name for name, value in config.items() if name in base_config and _as_json(base_config[name]) != _as_json(value)
    ]:
        name = differing[0]
        raise ValueError(
            f"this student's base has {name} {config[name]}, but the given base has {base_config[name]}; pass its own base"
        )
    sample = torch.tensor(settings["base_sample"]["weights"])
    found = torch.tensor(base_sample(base.transformer, settings["base_sample"]["layers"]))
    # Both may have been rounded to 16 bits.
    if not torch.allclose(found, sample, rtol=0.01, atol=1e-6):
        fused = "".join(f", with {each['path']} fused at weight {each['weight']:g}" for each in settings["base_lora"])
        raise ValueError(
            f"the weights of the given base are not those that this student was trained on; pass its own base{fused}"
        )
    network = build_on_shared_weights(base.transformer, family.network_class, config)
    _separate_time(network)
    add_lora(network, LoraConfig.from_pretrained(str(directory)))
    lora = {name.removeprefix(PREFIX): value for name, value in load_file(directory / LORA_WEIGHTS).items()}
    times = load_file(directory / TIME_WEIGHTS)
    if lora.keys() != lora_weights(network).keys() or times.keys() != time_weights(network).keys():
        raise ValueError(f"the weights in {directory} do not match the layers in its {SETTINGS}; export the student again")
    set_peft_model_state_dict(network, lora, ADAPTER)
    network.load_state_dict(times, strict=False)
    sampling = settings["max_sequence_length"], settings["stochastic_sampling"]
    return student_pipeline(family, base, network.eval(), *sampling)


def _separate_time(network: TwoTimeModel) -> None:
    """Replace time embedders that are shared with the base by float32 copies: the base may be in 16 bits."""
    for part in time_modules(network).values():
        for module in part.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().float(), requires_grad=False))


def _as_json(value: Any) -> Any:
    """Convert a value as a round trip through JSON does."""
    return list(value) if isinstance(value, tuple) else value
