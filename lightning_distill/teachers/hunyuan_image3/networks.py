"""Networks of HunyuanImage 3.0, read as wholes or, where processes share them, part by part."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from lightning_distill.sharding.protocols import Sharding
from lightning_distill.sharding.stored_weights import StoredWeights
from lightning_distill.students.two_time import TwoTimeEmbedding
from lightning_distill.students.two_time_hunyuan_image3 import TwoTimeHunyuanImage3
from lightning_distill.teachers.hunyuan_image3.directory import published_class, two_time_class
from lightning_distill.teachers.sharded_loading import fill_small_parts
from lightning_distill.teachers.smooth_time import SmoothTimeReport
from lightning_distill.teachers.student import start_from
from lightning_distill.teachers.student_options import StudentOptions

IMPLEMENTATIONS = {"attn_implementation": "sdpa", "moe_impl": "eager"}
"""Of what the published code has in several ways: those that run on any device."""


def read_teacher(directory: Path, dtype: torch.dtype, sharding: Sharding | None) -> TwoTimeHunyuanImage3:
    """The part of a published model that draws.

    Args:
        directory: As it is published.
        dtype: Of its weights, but for those of times, and those that the published code wants in float32.
        sharding: By which it is spread over processes; None reads it whole.
    """
    kind: Any = two_time_class(published_class(directory), TwoTimeHunyuanImage3)
    if sharding is None:
        teacher: TwoTimeHunyuanImage3 = kind.from_pretrained(directory, dtype=dtype, use_safetensors=True, **IMPLEMENTATIONS)
        return teacher.requires_grad_(False).eval()
    config = kind.config_class.from_pretrained(directory, **IMPLEMENTATIONS)
    weights = StoredWeights.of_component(directory)
    network = _empty(kind, config, weights, dtype).requires_grad_(False).eval()
    sharding.shard(network, weights)
    return network


def build_student(
    teacher: TwoTimeHunyuanImage3, options: StudentOptions, directory: Path, sharding: Sharding | None
) -> tuple[TwoTimeHunyuanImage3, SmoothTimeReport | None]:
    """A copy of a teacher that trains, float32 whatever the teacher's precision, and how well its refitted embedders fit.

    Args:
        teacher: Of `read_teacher`.
        options: Of the student.
        directory: Of the teacher.
        sharding: By which both are spread over processes.
    """
    kind, config = two_time_class(teacher.published, TwoTimeHunyuanImage3), student_config(teacher.config, options)
    if sharding is None:
        student = _copy(kind, config, teacher)
        report = start_from(teacher.timestep_embedders, student, options)
        return student.requires_grad_(True).train(), report
    weights = StoredWeights.of_component(directory)
    student = _empty(kind, config, weights, torch.float32)
    embedders = _empty(kind, teacher.config, weights, torch.float32).timestep_embedders
    report = start_from(embedders, student, options)
    student.requires_grad_(True).train()
    sharding.shard(student, weights)
    return student, report


def without_weights(directory: Path, options: StudentOptions) -> TwoTimeHunyuanImage3:
    """A student of a published model whose weights take no memory."""
    kind: Any = two_time_class(published_class(directory), TwoTimeHunyuanImage3)
    config = kind.config_class.from_pretrained(directory, **IMPLEMENTATIONS)
    return to_fake(kind, student_config(config, options))


def to_fake(kind: type[TwoTimeHunyuanImage3], config: Any, dtype: torch.dtype = torch.float32) -> TwoTimeHunyuanImage3:
    """A network on the meta device; buffers are where they always are."""
    with _default(dtype), init_empty_weights(include_buffers=False):
        network = kind(config)
    for part in network.modules():
        if isinstance(part, TwoTimeEmbedding):
            part.float()
    return network


def student_config(teacher: Any, options: StudentOptions) -> Any:
    """The configuration of a student, of that of its teacher."""
    config = copy.deepcopy(teacher)
    config.interval_embedding = options.interval_embedding
    config.time_frequency_bound = options.frequency_bound if options.time_embedding == "smooth" else None
    config.interval_frequency_bound = options.frequency_bound
    return config


def _copy(kind: type[TwoTimeHunyuanImage3], config: Any, teacher: TwoTimeHunyuanImage3) -> TwoTimeHunyuanImage3:
    # In float32 whatever the teacher's precision: an update of a bfloat16 weight is mostly rounded away.
    student = kind(config).to(next(teacher.parameters()).device, torch.float32)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    own = tuple(f"{name}." for name, part in student.named_modules() if isinstance(part, TwoTimeEmbedding))
    if unexpected or not all(name.startswith(own) for name in missing):
        raise RuntimeError(f"the student does not match its teacher: missing {missing}, unexpected {unexpected}")
    return student


def _empty(kind: type[TwoTimeHunyuanImage3], config: Any, weights: StoredWeights, dtype: torch.dtype) -> TwoTimeHunyuanImage3:
    network = to_fake(kind, config, dtype)
    fill_small_parts(network, weights)
    return network


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """What is built within has this precision, unless its code asks for another, as transformers builds it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
