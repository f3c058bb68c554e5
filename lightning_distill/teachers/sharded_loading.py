"""Networks that no process ever holds as a whole: built without memory, then filled part by part from files."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.sharding.protocols import Sharding, SharesBaseWeights
from lightning_distill.sharding.stored_weights import StoredWeights
from lightning_distill.students.lora_student import add_lora, build_over, own_parts
from lightning_distill.students.two_time import TwoTimeModel
from lightning_distill.teachers.smooth_time import SmoothTimeReport
from lightning_distill.teachers.student import lora_config, make_trainable, start_from, student_config
from lightning_distill.teachers.student_options import StudentOptions


def stored_component(
    pretrained: str, revision: str | None, name: str, setting: str = "adapter.pretrained"
) -> tuple[StoredWeights, Path]:
    """The weights of a part of a pipeline, in a directory or, once downloaded, in the hub's cache, and the part's directory.

    Raises:
        ConfigurationError: If they are not in safetensors.
    """
    directory = Path(pretrained)
    if not directory.is_dir():
        patterns = ["model_index.json", f"{name}/*"]
        directory = Path(
            snapshot_download(pretrained, revision=revision, allow_patterns=patterns, ignore_patterns=["*.fp16*", "*.bin"])
        )
    try:
        return StoredWeights.of_component(directory / name), directory / name
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"{setting} is {pretrained!r}, whose {name} cannot be read in parts ({error}); convert it to safetensors"
        ) from error


def meta_network(network_class: type[TwoTimeModel], config: dict[str, Any], weights: StoredWeights) -> TwoTimeModel:
    """A network whose parameters take no memory yet, but for embedders of time that have something of their own.

    Those are small, and a student's are computed from whole ones. They are drawn or read, float32, on the CPU. Stored buffers
    are read.

    Args:
        network_class: Of the family.
        config: Of the network.
        weights: The pipeline's.

    Raises:
        RuntimeError: If the files lack a weight.
    """
    with init_empty_weights(include_buffers=False):
        network: TwoTimeModel = network_class.from_config(config)
    fill_small_parts(network, weights)
    return network


@torch.no_grad()
def fill_small_parts(network: nn.Module, weights: StoredWeights) -> None:
    """Draw or read what a network without weights needs to have: its embedders of time, float32, on the CPU, and buffers.

    Raises:
        RuntimeError: If the files lack a weight of what is left.
    """
    for path, part in own_parts(network).items():
        _fill(part, path, weights)
    if missing := [name for name, parameter in network.named_parameters() if parameter.is_meta and name not in weights]:
        raise RuntimeError(f"the network's files do not match its configuration: they lack {missing}")
    for name, buffer in network.named_buffers():
        if name in weights:
            buffer.copy_(weights.read(name))


def build_sharded_student(
    network_class: type[TwoTimeModel],
    teacher: dict[str, Any],
    options: StudentOptions,
    weights: StoredWeights,
    sharding: Sharding,
) -> tuple[TwoTimeModel, SmoothTimeReport | None]:
    """As `build_student`, from a teacher's files.

    Args:
        network_class: Of the family.
        teacher: The configuration of the teacher.
        options: Of the student.
        weights: The teacher's, or those of the student that this one starts from.
        sharding: By which the student is spread over processes.
    """
    student = meta_network(network_class, student_config(teacher, options), weights)
    embedders = meta_network(network_class, teacher, weights).timestep_embedders if options.pretrained is None else []
    report = start_from(embedders, student, options)
    make_trainable(student)
    sharding.shard(student, weights)
    return student, report


def build_sharded_lora(
    network_class: type[TwoTimeModel],
    teacher: TwoTimeModel,
    options: StudentOptions,
    weights: StoredWeights,
    sharding: Sharding,
) -> tuple[TwoTimeModel, SmoothTimeReport | None]:
    """As `build_student` with LoRA: on the weights of a teacher that is spread already, which stay where they are.

    Args:
        network_class: Of the family.
        teacher: Spread by `sharding`.
        options: Of the student.
        weights: The teacher's.
        sharding: By which what trains is spread over processes.

    Raises:
        ConfigurationError: If the strategy has no way of sharing weights.
    """
    check_base_sharing(sharding)
    assert isinstance(sharding, SharesBaseWeights)
    assert options.lora is not None
    student = build_over(teacher, network_class, student_config(teacher.config, options))
    for path, part in own_parts(student).items():
        _read(part.cpu(), path, weights)
    with torch.random.fork_rng(devices=[]):  # low-rank updates are drawn as they are beside a whole teacher
        embedders = meta_network(network_class, dict(teacher.config), weights).timestep_embedders
    report = start_from(embedders, student, options)
    add_lora(student, lora_config(student, options.lora)).train()
    sharding.shard_on_base(student, teacher)
    return student, report


def check_base_sharing(sharding: Sharding | None) -> None:
    """Raise `ConfigurationError` if networks cannot share weights under a strategy."""
    if sharding is not None and not isinstance(sharding, SharesBaseWeights):
        raise ConfigurationError(
            f"LoRA shares weights between networks, and {type(sharding).__name__} takes them apart; set trainer.strategy to "
            "fsdp2 or ddp, or student.lora and alignment.critic_lora to null"
        )


def _fill(part: nn.Module, path: str, weights: StoredWeights) -> None:
    part.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):  # what is drawn later is what it is in a process that has whole networks
        for module in part.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    _read(part, path, weights)


@torch.no_grad()
def _read(part: nn.Module, path: str, weights: StoredWeights) -> None:
    for name, parameter in part.named_parameters():
        if (stored := f"{path}.{name}") in weights and (value := weights.read(stored)).shape == parameter.shape:
            parameter.copy_(value)
