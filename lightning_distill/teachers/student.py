"""Students of a teacher: a copy that trains as a whole, or low-rank updates on the teacher's own weights."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from peft import LoraConfig
from torch import nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.students.lora_student import add_lora, build_over, lora_modules, own_prefixes
from lightning_distill.students.two_time import TwoTimeEmbedding, TwoTimeModel
from lightning_distill.teachers.registry import resolve_pretrained
from lightning_distill.teachers.smooth_time import SmoothTimeReport, refit_embedders
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions


def build_student(teacher: TwoTimeModel, options: StudentOptions) -> tuple[TwoTimeModel, SmoothTimeReport | None]:
    """A trainable network with an interval input and, by default, smooth time, which otherwise computes what the teacher does.

    Args:
        teacher: Frozen.
        options: Of the student. With LoRA, its parameters are the teacher's own objects, but for the time embedders and the
            low-rank updates, which start without effect. With `pretrained`, it computes what that student does.

    Returns:
        The student, and how well its refitted time embedders follow the teacher's (None if they were not refitted here).
    """
    config = student_config(teacher.config, options)
    if options.pretrained is not None:
        student = _read(options.pretrained, type(teacher)).to(teacher.device)
    else:
        student = _copy(teacher, config) if options.lora is None else _over(teacher, config)
    report = start_from(teacher.timestep_embedders, student, options)
    if options.lora is None:
        make_trainable(student)
    else:
        add_lora(student, lora_config(student, options.lora))
    return student.train(), report


def make_trainable(network: nn.Module) -> nn.Module:
    """Let all weights of a network train, but those whose results nothing reads: DDP waits for gradients of all that train."""
    network.requires_grad_(True)
    for name in network.unread_parts() if isinstance(network, TwoTimeModel) else ():
        network.get_submodule(name).requires_grad_(False)
    return network.train()


def student_config(teacher: Mapping[str, Any], options: StudentOptions) -> dict[str, Any]:
    """The configuration of a student, of that of its teacher."""
    smooth = options.time_embedding == "smooth"
    return {key: value for key, value in teacher.items() if not key.startswith("_")} | {
        "interval_embedding": options.interval_embedding,
        "time_frequency_bound": options.frequency_bound if smooth else None,
        "interval_frequency_bound": options.frequency_bound,
        "rescaled_time": options.time_embedding == "rescaled",
        "policy_points": options.policy_points,
    }


class TwoTimeNetwork(Protocol):
    """What a student's time inputs are brought to their start by."""

    @property
    def timestep_embedders(self) -> Sequence[TwoTimeEmbedding]:
        """All that embed times."""

    def reset_interval_embedding(self) -> None:
        """Bring the interval input to its start."""

    def enable_gradient_checkpointing(self) -> None:
        """Run blocks again in the backward pass."""


def start_from(
    embedders: Sequence[TwoTimeEmbedding], student: TwoTimeNetwork, options: StudentOptions
) -> SmoothTimeReport | None:
    """Refit a student's time embedders to its teacher's, if they are to be smooth, and reset its interval input.

    One that starts with the weights of another student has them all already.
    """
    report = None
    if options.pretrained is None:
        if options.time_embedding == "smooth":
            report = refit_embedders(embedders, student.timestep_embedders, options.derivative_penalty)
        student.reset_interval_embedding()
    if options.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    return report


def check_pretrained(options: StudentOptions, network_class: type[TwoTimeModel], config: Mapping[str, Any]) -> None:
    """Refuse a student to start from that cannot be read, or is built otherwise than by this configuration.

    Args:
        options: With `pretrained`.
        network_class: Of the family.
        config: Of the student.

    Raises:
        ConfigurationError: If that is so.
    """
    pretrained = options.pretrained
    if options.lora is not None:
        raise ConfigurationError(
            "student.lora and student.pretrained are both set, and low-rank updates start on the teacher's own weights; set "
            "one of them to null"
        )
    try:
        stored = network_class.load_config(resolve_pretrained(str(pretrained)), subfolder="transformer")
    except OSError as error:
        raise ConfigurationError(
            f"student.pretrained is {pretrained!r}, whose transformer/config.json cannot be read; give a student's pipeline as "
            "ExportPipeline writes it, or null to start as the teacher"
        ) from error
    if stored.get("interval_embedding", "none") == "none":
        raise ConfigurationError(
            f"student.pretrained is {pretrained!r}, whose transformer takes one time, as teachers do; give a student's "
            "pipeline as ExportPipeline writes it, or null to start as the teacher"
        )
    for name, value in {"rescaled_time": False, "policy_points": 1}.items():
        stored.setdefault(name, value)  # of students from before there was a choice
    for name, value in config.items():
        if name in stored and stored[name] != value:
            raise ConfigurationError(
                f"student.pretrained is {pretrained!r}, whose {name} is {stored[name]!r} where this configuration has "
                f"{value!r}; set adapter and student as it was trained with"
            )


def lora_config(network: TwoTimeModel, options: LoraOptions) -> LoraConfig:
    """What peft is told about a network's low-rank updates.

    Raises:
        ConfigurationError: If the network has no layers of these names.
    """
    try:
        modules = lora_modules(network, network.lora_targets if options.targets is None else options.targets)
    except ValueError as error:
        raise ConfigurationError(
            f"lora.targets does not fit: {error}; this family's own are {', '.join(network.lora_targets)}"
        ) from error
    unread = tuple(network.unread_parts())
    modules = [name for name in modules if not name.startswith(unread)]  # as of `make_trainable`
    alpha = options.rank if options.alpha is None else options.alpha
    return LoraConfig(r=options.rank, lora_alpha=alpha, target_modules=modules)


def _copy(teacher: TwoTimeModel, config: dict[str, Any]) -> TwoTimeModel:
    # In float32 whatever the teacher's precision: an update of a bfloat16 weight is mostly rounded away.
    student: TwoTimeModel = type(teacher).from_config(config).to(teacher.device)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    if unexpected or not all(name.startswith(own_prefixes(student)) for name in missing):
        raise RuntimeError(f"the student does not match its teacher: missing {missing}, unexpected {unexpected}")
    return student


def _read(pretrained: str, network_class: type[TwoTimeModel]) -> TwoTimeModel:
    student: TwoTimeModel = network_class.from_pretrained(
        resolve_pretrained(pretrained), subfolder="transformer", torch_dtype=torch.float32, use_safetensors=True
    )
    return student


def _over(teacher: TwoTimeModel, config: dict[str, Any]) -> TwoTimeModel:
    student = build_over(teacher, type(teacher), config)
    own = own_prefixes(student)
    student.load_state_dict({name: value for name, value in teacher.state_dict().items() if name.startswith(own)}, strict=False)
    return student
