"""Build students from a teacher: full copies, or low-rank updates on the teacher's weights."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from peft import LoraConfig
from torch import nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.students.lora_student import add_lora, build_on_shared_weights, lora_modules, student_only_prefixes
from lightning_distill.students.two_time import TwoTimeEmbedding, TwoTimeModel
from lightning_distill.teachers.component_files import check_component
from lightning_distill.teachers.pipeline_files import check_digests
from lightning_distill.teachers.pipeline_location import PipelineLocation
from lightning_distill.teachers.smooth_time import SmoothTimeReport, refit_embedders
from lightning_distill.teachers.student_exports import check_start
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions


def build_student(teacher: TwoTimeModel, options: StudentOptions) -> tuple[TwoTimeModel, SmoothTimeReport | None]:
    """Build a trainable student with an interval input and, by default, smooth time; it starts as the teacher otherwise.

    Args:
        teacher: The frozen teacher.
        options: Options of the student. With LoRA, the student shares the parameter objects of the teacher. Only the time
            embedders and the low-rank updates, which have no effect at first, are new. With `pretrained`, the student
            starts as that exported student.

    Returns:
        The student, and the fit of its time embedders to the teacher's (None if they were not refitted here).
    """
    config = student_config(teacher.config, options)
    if options.pretrained is not None:
        student = _load_pretrained(options.pretrained, type(teacher)).to(teacher.device)
    else:
        student = _copy(teacher, config) if options.lora is None else _share_weights(teacher, config)
    report = initialize_time_inputs(teacher.timestep_embedders, student, options)
    if options.lora is None:
        make_student_trainable(student, options)
    else:
        add_lora(student, lora_config(student, options.lora))
    return student.train(), report


def make_trainable(network: nn.Module) -> nn.Module:
    """Make all weights trainable, except unused modules: DDP waits for the gradient of every trainable weight."""
    network.requires_grad_(True)
    for name in network.unused_module_names() if isinstance(network, TwoTimeModel) else ():
        network.get_submodule(name).requires_grad_(False)
    return network.train()


def make_student_trainable(network: TwoTimeModel, options: StudentOptions) -> None:
    """Make the weights of a student without LoRA trainable, except its time embedders if it has no interval input."""
    make_trainable(network)
    if options.interval_embedding == "none":
        for embedder in network.timestep_embedders:
            embedder.requires_grad_(False)


def student_config(teacher: Mapping[str, Any], options: StudentOptions) -> dict[str, Any]:
    """Configuration of a student, from that of its teacher."""
    smooth = options.time_embedding == "smooth"
    return {key: value for key, value in teacher.items() if not key.startswith("_")} | {
        "interval_embedding": options.interval_embedding,
        "time_frequency_bound": options.frequency_bound if smooth else None,
        "interval_frequency_bound": options.frequency_bound,
        "rescaled_time": options.time_embedding == "rescaled",
        "policy_points": options.policy_points,
    }


class TwoTimeNetwork(Protocol):
    """Interface of a two-time network that `initialize_time_inputs` needs."""

    @property
    def timestep_embedders(self) -> Sequence[TwoTimeEmbedding]:
        """All timestep embedders."""

    def reset_interval_embedding(self) -> None:
        """Initialise the interval input."""

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the activations of blocks in the backward pass."""


def initialize_time_inputs(
    embedders: Sequence[TwoTimeEmbedding], student: TwoTimeNetwork, options: StudentOptions
) -> SmoothTimeReport | None:
    """Refit the time embedders of a student to its teacher's for smooth time, and initialise its interval input.

    Neither is necessary with `options.pretrained`: the exported student has these weights.

    Args:
        embedders: Time embedders of the teacher.
        student: The student, changed in place.
        options: Options of the student.

    Returns:
        The fit of the time embedders (None if they were not refitted).
    """
    report = None
    if options.pretrained is None:
        if options.time_embedding == "smooth":
            report = refit_embedders(embedders, student.timestep_embedders, options.derivative_penalty)
        if options.interval_embedding != "none":
            student.reset_interval_embedding()
    if options.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    return report


def check_pretrained(options: StudentOptions, network_class: type[TwoTimeModel], config: Mapping[str, Any]) -> None:
    """Check an exported student before a new student starts from its weights.

    Args:
        options: Options with `pretrained` set.
        network_class: Network class of the family.
        config: Configuration of the new student.

    Raises:
        ConfigurationError: If LoRA is set, the exported student cannot be read, or its configuration differs from `config`.
    """
    pretrained = options.pretrained
    if options.lora is not None:
        raise ConfigurationError(
            "student.lora and student.pretrained are both set, but low-rank updates start from the teacher's weights; set one "
            "of them to null"
        )
    location = PipelineLocation(str(pretrained), None, None, "student.pretrained")
    if location.directory is not None:
        check_start(location.directory, location.source)
        check_digests(location.directory, location.source)
    stored = location.read_config(network_class, "transformer/config.json", subfolder="transformer")
    if options.interval_embedding != "none" and stored.get("interval_embedding", "none") == "none":
        raise ConfigurationError(
            f"student.pretrained is {pretrained!r}, whose transformer has one time input, so it is a teacher or a stock "
            "export; set it to an export as any_step, or to null to start from the teacher"
        )
    defaults = {"interval_embedding": "none", "time_frequency_bound": None, "rescaled_time": False, "policy_points": 1}
    for name, value in defaults.items():
        stored.setdefault(name, value)  # stock transformers and older exports do not have these settings
    for name, value in config.items():
        if name in stored and stored[name] != value:
            raise ConfigurationError(
                f"student.pretrained is {pretrained!r}, whose {name} is {stored[name]!r}, but this configuration has "
                f"{value!r}; use the adapter and student settings of its training"
            )
    if location.directory is not None:
        check_component(location.directory, "transformer", network_class, location.source)


def lora_config(network: TwoTimeModel, options: LoraOptions) -> LoraConfig:
    """Peft configuration of the low-rank updates of a network.

    Raises:
        ConfigurationError: If a target matches no layer of the network.
    """
    try:
        modules = lora_modules(network, network.lora_targets if options.targets is None else options.targets)
    except ValueError as error:
        raise ConfigurationError(
            f"lora.targets does not fit: {error}; the defaults of this family are {', '.join(network.lora_targets)}"
        ) from error
    unused_modules = tuple(network.unused_module_names())
    modules = [name for name in modules if not name.startswith(unused_modules)]  # as in `make_trainable`
    alpha = options.rank if options.alpha is None else options.alpha
    return LoraConfig(r=options.rank, lora_alpha=alpha, target_modules=modules)


def _copy(teacher: TwoTimeModel, config: dict[str, Any]) -> TwoTimeModel:
    # Always float32: most of an update of a bfloat16 weight is lost in rounding.
    student: TwoTimeModel = type(teacher).from_config(config).to(teacher.device)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    if unexpected or not all(name.startswith(student_only_prefixes(student)) for name in missing):
        raise RuntimeError(f"the student does not match its teacher: missing {missing}, unexpected {unexpected}")
    return student


def _load_pretrained(pretrained: str, network_class: type[TwoTimeModel]) -> TwoTimeModel:
    student: TwoTimeModel = PipelineLocation(pretrained, None, None, "student.pretrained").load(
        "transformer", network_class, torch.float32
    )
    return student


def _share_weights(teacher: TwoTimeModel, config: dict[str, Any]) -> TwoTimeModel:
    student = build_on_shared_weights(teacher, type(teacher), config)
    own = student_only_prefixes(student)
    student.load_state_dict({name: value for name, value in teacher.state_dict().items() if name.startswith(own)}, strict=False)
    return student
