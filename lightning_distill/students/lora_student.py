"""Students of a few weights on the frozen ones of another network: LoRA (arXiv 2106.09685) beside own time embedders.

This file imports torch, diffusers, peft and siblings that travel with it: it is part of every student that is exported without
its base, and must run without this package.
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
from .two_time import OwnPart, TwoTimeModel

ADAPTER = "default"
"""The name that peft's layers keep the weights under."""
SETTINGS = "student.json"
"""File of a directory that `load_lora_student` reads: what the student's base is, and what was made of it."""
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
"""LoRA weights there, under the names that diffusers gives them."""
TIME_WEIGHTS = "time_embedders.safetensors"
"""The weights there of what is the student's own: time embedders, and a policy's grid."""
PREFIX = "transformer."
"""What diffusers puts before the names of a transformer's LoRA weights."""


def build_over(base: nn.Module, network_class: type[TwoTimeModel], config: dict[str, Any]) -> TwoTimeModel:
    """A network whose parameters are those of another, the very same objects, but for its own parts.

    Those are time embedders and, of a student with a policy, its grid.

    Args:
        base: A network with parameters of the same names, two-time or stock. Buffers are shared as well.
        network_class: Of the network.
        config: Its settings.

    Returns:
        The network, on the base's device, with own parts in float32 that are drawn anew.

    Raises:
        ValueError: If the base lacks a parameter or a buffer, or has one of another shape.
    """
    with init_empty_weights(include_buffers=False):
        network = network_class.from_config(config)
    own = own_prefixes(network)
    for part in own_parts(network).values():
        part.to_empty(device=next(base.parameters()).device)
        for layer in (each for each in part.modules() if isinstance(each, nn.Linear)):
            layer.reset_parameters()
    known: dict[str, Tensor] = dict([*base.named_parameters(), *base.named_buffers()])
    for name, empty in [*network.named_parameters(), *network.named_buffers()]:
        if name.startswith(own):
            continue
        if name not in known or known[name].shape != empty.shape:
            raise ValueError(f"the base has no {name} of shape {tuple(empty.shape)}; it is not what the student was made from")
        path, _, attribute = name.rpartition(".")
        parent = network.get_submodule(path)
        setattr(parent, attribute, known[name])
        if attribute in parent._buffers:
            parent._non_persistent_buffers_set.add(attribute)  # it is the base that saves it
    return network


def own_parts(network: nn.Module) -> dict[str, nn.Module]:
    """What a student has beside its teacher's weights, by name: time embedders, and a policy's grid."""
    return {name: network.get_submodule(name) for name, part in network.named_modules() if isinstance(part, OwnPart)}


def own_prefixes(network: nn.Module) -> tuple[str, ...]:
    """What the names of their weights begin with."""
    return tuple(f"{name}." for name in own_parts(network))


def lora_modules(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """The linear layers inside a network's stacks of blocks whose names end in one of `targets`.

    Args:
        network: A transformer; its weights are not looked at.
        targets: Ends of names, such as "to_q" or "ff.net.2".

    Raises:
        ValueError: If a target matches no layer.
    """
    linear = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    found: dict[str, list[str]] = {}
    for target in targets:
        # Blocks are numbered: `proj_out` of a block is meant, not the network's own last layer.
        blocks = [name.removesuffix(f".{target}").split(".") if name.endswith(f".{target}") else [] for name in linear]
        found[target] = [name for name, path in zip(linear, blocks, strict=True) if any(part.isdigit() for part in path)]
        if not found[target]:
            raise ValueError(f"no linear layer of a block of {type(network).__name__} ends in {target!r}")
    chosen = {name for names in found.values() for name in names}
    return [name for name in linear if name in chosen]


def add_lora(network: TwoTimeModel, config: LoraConfig) -> TwoTimeModel:
    """Give layers of a network low-rank updates, in float32, that start without effect; they and own parts train alone."""
    inject_adapter_in_model(config, network, ADAPTER)
    # peft takes the base's precision, in which an update of a bfloat16 weight would mostly be rounded away.
    cast_training_params(network, torch.float32)
    for part in own_parts(network).values():
        part.requires_grad_(True)
    return network


def lora_layers(network: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers of a network by name."""
    return {name: part for name, part in network.named_modules() if isinstance(part, LoraLayer)}


def lora_weights(network: TwoTimeModel) -> dict[str, Tensor]:
    """LoRA weights by names as of peft, `transformer_blocks.0.attn.to_q.lora_A.weight`."""
    state: dict[str, Tensor] = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    return state


def time_weights(network: TwoTimeModel) -> dict[str, Tensor]:
    """Weights of the time embedders, and of a policy's grid, by their names in the network."""
    own = own_prefixes(network)
    return {name: value for name, value in network.state_dict().items() if name.startswith(own)}


@torch.no_grad()
def merged(network: TwoTimeModel) -> TwoTimeModel:
    r"""A plain network of the same function, :math:`W + s B A` in place of every LoRA layer, in float32 on the CPU.

    It is the only copy that is made. In bfloat16 the updates, which are small beside the weights, would mostly be rounded away.
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
    expected = plain.state_dict().keys()  # without buffers that are never saved
    plain.load_state_dict({name: value for name, value in state.items() if name in expected}, assign=True)
    return plain.eval()


def base_sample(network: nn.Module, layers: Sequence[str]) -> list[float]:
    """The first weights of some layers of a network, by which it is told from another of the same shapes."""
    sample: list[float] = []
    for name in layers:
        weight = network.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        sample += weight.flatten()[:4].tolist()
    return sample


def load_lora_student(base: DiffusionPipeline, directory: str | Path) -> FewStepPipeline:
    """Put a student that was exported without its base onto the base, whose weights are shared and not copied.

    Args:
        base: The stock pipeline that the student was made from, in any precision. It goes on drawing as before.
        directory: Of the export.

    Returns:
        A pipeline that draws in a few steps.

    Raises:
        ValueError: If the base is not one that the student was made from.
    """
    directory = Path(directory)
    settings = json.loads((directory / SETTINGS).read_text())
    module, kind = settings["pipeline"]
    family: type[FewStepPipeline] = getattr(import_module(f".{module}", __package__), kind)
    if not isinstance(base, family.stock_class):
        raise ValueError(f"this student's base is a {family.stock_class.__name__}, not a {type(base).__name__}")
    config = settings["transformer"]
    known = base.transformer.config
    if differing := [name for name, value in config.items() if name in known and _plain(known[name]) != _plain(value)]:
        name = differing[0]
        raise ValueError(f"this student's base has {name} {config[name]}, and the one that is given {known[name]}")
    sample = torch.tensor(settings["base_sample"]["weights"])
    found = torch.tensor(base_sample(base.transformer, settings["base_sample"]["layers"]))
    # Both may have been rounded to 16 bits.
    if not torch.allclose(found, sample, rtol=0.01, atol=1e-6):
        raise ValueError("the weights of the base that is given are not those that this student was made from")
    network = build_over(base.transformer, family.network_class, config)
    add_lora(network, LoraConfig.from_pretrained(str(directory)))
    lora = {name.removeprefix(PREFIX): value for name, value in load_file(directory / LORA_WEIGHTS).items()}
    times = load_file(directory / TIME_WEIGHTS)
    if lora.keys() != lora_weights(network).keys() or times.keys() != time_weights(network).keys():
        raise ValueError(f"the weights in {directory} are not those of the layers that its settings name")
    set_peft_model_state_dict(network, lora, ADAPTER)
    network.load_state_dict(times, strict=False)
    how = settings["max_sequence_length"], settings["stochastic_sampling"]
    return student_pipeline(family, base, network.eval(), *how)


def _plain(value: Any) -> Any:
    """As JSON knows it."""
    return list(value) if isinstance(value, tuple) else value
