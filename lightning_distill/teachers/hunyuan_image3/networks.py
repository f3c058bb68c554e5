"""Load teachers and build students of HunyuanImage 3.0, unsharded or sharded over processes."""

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
from lightning_distill.teachers.sharded_loading import materialize_time_modules
from lightning_distill.teachers.smooth_time import SmoothTimeReport
from lightning_distill.teachers.student import initialize_time_inputs
from lightning_distill.teachers.student_options import StudentOptions

IMPLEMENTATIONS = {"attn_implementation": "sdpa", "moe_impl": "eager"}
"""Implementations in the published code that run on any device."""


def read_teacher(directory: Path, dtype: torch.dtype, sharding: Sharding | None) -> TwoTimeHunyuanImage3:
    """Load the image generation network of a published model, frozen and in evaluation mode.

    Args:
        directory: The published directory.
        dtype: Dtype of the weights, except time embeddings and weights for which the published code requires float32.
        sharding: Strategy that shards the network over processes. None: the network is not sharded.
    """
    kind: Any = two_time_class(published_class(directory), TwoTimeHunyuanImage3)
    if sharding is None:
        teacher: TwoTimeHunyuanImage3 = kind.from_pretrained(directory, dtype=dtype, use_safetensors=True, **IMPLEMENTATIONS)
        return teacher.requires_grad_(False).eval()
    config = kind.config_class.from_pretrained(directory, **IMPLEMENTATIONS)
    weights = StoredWeights.of_component(directory)
    network = _meta_network(kind, config, weights, dtype).requires_grad_(False).eval()
    sharding.shard(network, weights)
    return network


def build_student(
    teacher: TwoTimeHunyuanImage3, options: StudentOptions, directory: Path, sharding: Sharding | None
) -> tuple[TwoTimeHunyuanImage3, SmoothTimeReport | None]:
    """Build a trainable copy of a teacher, in float32 for every dtype of the teacher.

    Args:
        teacher: A network from `read_teacher`.
        options: Options of the student.
        directory: The published directory of the teacher.
        sharding: Strategy that shards teacher and student over processes. None: they are not sharded.

    Returns:
        The student, and the fit of its time embedders to the teacher's (None if they were not refitted).
    """
    kind, config = two_time_class(teacher.published, TwoTimeHunyuanImage3), student_config(teacher.config, options)
    if sharding is None:
        student = _copy(kind, config, teacher)
        report = initialize_time_inputs(teacher.timestep_embedders, student, options)
        return student.requires_grad_(True).train(), report
    weights = StoredWeights.of_component(directory)
    student = _meta_network(kind, config, weights, torch.float32)
    embedders = _meta_network(kind, teacher.config, weights, torch.float32).timestep_embedders
    report = initialize_time_inputs(embedders, student, options)
    student.requires_grad_(True).train()
    sharding.shard(student, weights)
    return student, report


def build_meta_student(directory: Path, options: StudentOptions) -> TwoTimeHunyuanImage3:
    """Build a student of a published model on the meta device."""
    kind: Any = two_time_class(published_class(directory), TwoTimeHunyuanImage3)
    config = kind.config_class.from_pretrained(directory, **IMPLEMENTATIONS)
    return build_on_meta_device(kind, student_config(config, options))


def build_on_meta_device(
    kind: type[TwoTimeHunyuanImage3], config: Any, dtype: torch.dtype = torch.float32
) -> TwoTimeHunyuanImage3:
    """Build a network with parameters on the meta device; buffers have their usual device."""
    with _default_dtype(dtype), init_empty_weights(include_buffers=False):
        network = kind(config)
    for part in network.modules():
        if isinstance(part, TwoTimeEmbedding):
            part.float()
    return network


def student_config(teacher: Any, options: StudentOptions) -> Any:
    """Configuration of a student, from that of its teacher."""
    config = copy.deepcopy(teacher)
    config.interval_embedding = options.interval_embedding
    config.time_frequency_bound = options.frequency_bound if options.time_embedding == "smooth" else None
    config.interval_frequency_bound = options.frequency_bound
    return config


def _copy(kind: type[TwoTimeHunyuanImage3], config: Any, teacher: TwoTimeHunyuanImage3) -> TwoTimeHunyuanImage3:
    # Always float32: most of an update of a bfloat16 weight is lost in rounding.
    student = kind(config).to(next(teacher.parameters()).device, torch.float32)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    own = tuple(f"{name}." for name, part in student.named_modules() if isinstance(part, TwoTimeEmbedding))
    if unexpected or not all(name.startswith(own) for name in missing):
        raise RuntimeError(f"the student does not match its teacher: missing {missing}, unexpected {unexpected}")
    return student


def _meta_network(
    kind: type[TwoTimeHunyuanImage3], config: Any, weights: StoredWeights, dtype: torch.dtype
) -> TwoTimeHunyuanImage3:
    network = build_on_meta_device(kind, config, dtype)
    materialize_time_modules(network, weights)
    return network


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Context with this default dtype: as in transformers, modules get it unless their code sets another."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
