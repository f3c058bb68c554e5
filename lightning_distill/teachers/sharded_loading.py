"""Build networks on the meta device and read their shards from files, so that no process has the unsharded weights."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.sharding.protocols import Sharding, SharesBaseWeights
from lightning_distill.sharding.stored_weights import StoredWeights
from lightning_distill.sharding.weight_files import WeightFilesError
from lightning_distill.students.lora_student import add_lora, build_on_shared_weights, student_only_modules, time_modules
from lightning_distill.students.two_time import TwoTimeModel
from lightning_distill.teachers.pipeline_source import PipelineSource
from lightning_distill.teachers.smooth_time import SmoothTimeReport
from lightning_distill.teachers.student import initialize_time_inputs, lora_config, make_student_trainable, student_config
from lightning_distill.teachers.student_options import StudentOptions


def stored_component(
    pretrained: str, revision: str | None, name: str, setting: str = "adapter.pretrained", variant: str | None = None
) -> tuple[StoredWeights, Path]:
    """Find the weights of a pipeline component; downloads them if `pretrained` is a hub id.

    Args:
        pretrained: Directory or hub id of the pipeline.
        revision: Revision of a hub id.
        name: Name of the component, such as "transformer".
        setting: Dotted name of the setting that gave `pretrained`, for the error message.
        variant: Preferred variant of the weights, such as "fp16".

    Returns:
        The weights, and the directory of the component.

    Raises:
        ConfigurationError: If the weights are not in complete safetensors files.
    """
    directory = Path(pretrained)
    if not directory.is_dir():
        ignored = ["*.bin", *(() if variant else ("*.fp16*",))]
        patterns = ["model_index.json", f"{name}/*"]
        directory = Path(snapshot_download(pretrained, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
    try:
        return StoredWeights.of_component(directory / name, variant), directory / name
    except WeightFilesError as error:
        raise PipelineSource(setting, pretrained).error(f"whose {name} {error}") from error


def meta_network(network_class: type[TwoTimeModel], config: dict[str, Any], weights: StoredWeights) -> TwoTimeModel:
    """Build a network on the meta device, except its time embedders and its buffers.

    Time embedders are small, and those of a student are computed from the teacher's unsharded ones. They are initialised or
    read in float32 on the CPU. Stored buffers are read.

    Args:
        network_class: Network class of the family.
        config: Configuration of the network.
        weights: Stored weights of the transformer.

    Raises:
        RuntimeError: If the files lack a weight.
    """
    with init_empty_weights(include_buffers=False):
        network: TwoTimeModel = network_class.from_config(config)
    materialize_time_modules(network, weights)
    return network


@torch.no_grad()
def materialize_time_modules(network: nn.Module, weights: StoredWeights) -> None:
    """Initialise or read the time embedders of a meta network, float32 on the CPU, and read its buffers.

    Raises:
        RuntimeError: If the files lack a weight of the remaining modules.
    """
    for path, part in time_modules(network).items():
        _materialize(part, path, weights)
    if missing := [name for name, parameter in network.named_parameters() if parameter.is_meta and name not in weights]:
        raise RuntimeError(f"the network's files do not match its configuration: they lack {missing}")
    for name, buffer in network.named_buffers():
        if name in weights:
            buffer.copy_(weights.read(name))


@torch.no_grad()
def read_updated(network: nn.Module, weights: StoredWeights, names: Iterable[str]) -> None:
    """Read some weights of an unsharded network again, with their updates.

    The update of a stored weight is rounded once, as for sharded networks; that of a loaded one would be rounded twice.

    Args:
        network: The network, changed in place.
        weights: Stored weights with updates.
        names: Names of the updated weights.
    """
    for name in names:
        parameter = network.get_parameter(name)
        parameter.data = weights.read(name).to(parameter.device, parameter.dtype)


def build_sharded_student(
    network_class: type[TwoTimeModel],
    teacher: dict[str, Any],
    options: StudentOptions,
    weights: StoredWeights,
    sharding: Sharding,
) -> tuple[TwoTimeModel, SmoothTimeReport | None]:
    """Build a student on the meta device and read its shards from the teacher's files; otherwise as `build_student`.

    Args:
        network_class: Network class of the family.
        teacher: Configuration of the teacher.
        options: Options of the student.
        weights: Stored weights of the teacher, or of the exported student in `options.pretrained`.
        sharding: Strategy that shards the student.

    Returns:
        The sharded student, and the fit of its time embedders to the teacher's (None if they were not refitted here).
    """
    student = meta_network(network_class, student_config(teacher, options), weights)
    embedders = meta_network(network_class, teacher, weights).timestep_embedders if options.pretrained is None else []
    report = initialize_time_inputs(embedders, student, options)
    make_student_trainable(student, options)
    sharding.shard(student, weights)
    return student, report


def build_sharded_lora(
    network_class: type[TwoTimeModel],
    teacher: TwoTimeModel,
    options: StudentOptions,
    weights: StoredWeights,
    sharding: Sharding,
) -> tuple[TwoTimeModel, SmoothTimeReport | None]:
    """Build a LoRA student that shares the weights of a sharded teacher; otherwise as `build_student`.

    Args:
        network_class: Network class of the family.
        teacher: The teacher, already sharded by `sharding`.
        options: Options of the student.
        weights: Stored weights of the teacher.
        sharding: Strategy that shards the trainable weights.

    Returns:
        The sharded student, and the fit of its time embedders to the teacher's (None if they were not refitted here).

    Raises:
        ConfigurationError: If the strategy does not support shared base weights.
    """
    check_base_sharing(sharding)
    assert isinstance(sharding, SharesBaseWeights)
    assert options.lora is not None
    student = build_on_shared_weights(teacher, network_class, student_config(teacher.config, options))
    for path, part in student_only_modules(student).items():
        _read(part.cpu(), path, weights)
    with torch.random.fork_rng(devices=[]):  # low-rank updates get the same random numbers as beside an unsharded teacher
        embedders = meta_network(network_class, dict(teacher.config), weights).timestep_embedders
    report = initialize_time_inputs(embedders, student, options)
    add_lora(student, lora_config(student, options.lora)).train()
    sharding.shard_on_base(student, teacher)
    return student, report


def check_base_sharing(sharding: Sharding | None) -> None:
    """Check that networks can share base weights under a strategy.

    Raises:
        ConfigurationError: If the strategy does not support shared base weights.
    """
    if sharding is not None and not isinstance(sharding, SharesBaseWeights):
        raise ConfigurationError(
            f"{type(sharding).__name__} does not support weights that LoRA networks share; set trainer.strategy to fsdp2 or "
            "ddp, or student.lora and alignment.critic_lora to null"
        )


def _materialize(part: nn.Module, path: str, weights: StoredWeights) -> None:
    part.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):  # later random numbers equal those of a process with unsharded networks
        for module in part.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    _read(part, path, weights)


@torch.no_grad()
def _read(part: nn.Module, path: str, weights: StoredWeights) -> None:
    for name, parameter in part.named_parameters():
        if (stored := f"{path}.{name}") in weights and (value := weights.read(stored)).shape == parameter.shape:
            parameter.copy_(value)
