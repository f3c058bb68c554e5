"""Teachers, students and critics on fake tensors, with a given number of blocks."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.planning.fake_pipeline import to_fake
from lightning_distill.sharding.blocks import blocks, experts
from lightning_distill.students.lora_student import add_lora, student_only_prefixes
from lightning_distill.students.two_time import TwoTimeModel
from lightning_distill.teachers.diffusers_adapter import DTYPES, DiffusersAdapter
from lightning_distill.teachers.student import lora_config, make_student_trainable, student_config
from lightning_distill.teachers.student_options import StudentOptions

MEASURED_BLOCKS = 2
"""Blocks per list in a measured step. A step with one more block gives the cost of each further block."""


class FakeNetworks(Protocol):
    """Networks of a checkpoint that can be built with fewer blocks."""

    @property
    def depths(self) -> Mapping[str, int]:
        """Number of blocks of each list that has more blocks than are measured."""

    def build(self, module: TeacherStudentBase, depths: Mapping[str, int], mode: FakeTensorMode) -> None:
        """Build the networks of a method on fake tensors, in place of its `build_networks`; no EMA.

        Args:
            module: The method.
            depths: Number of blocks by list.
            mode: Mode of the fake tensors.
        """


@dataclass(frozen=True)
class PipelineNetworks:
    """Networks of a diffusers pipeline.

    Attributes:
        network: The teacher on the meta device.
        depths: Number of blocks of each list that has more blocks than are measured.
    """

    network: TwoTimeModel
    depths: dict[str, int]
    _students: dict[StudentOptions, TwoTimeModel] = field(default_factory=dict, repr=False)

    def build(self, module: TeacherStudentBase, depths: Mapping[str, int], mode: FakeTensorMode) -> None:
        """Build the networks of a method on fake tensors; see `FakeNetworks.build`."""
        adapter = module.adapter
        assert isinstance(adapter, DiffusersAdapter)
        teacher = _truncated(self.network, depths)
        nn.Module.to(teacher, DTYPES[adapter.torch_dtype])  # the override in diffusers warns about modules in float32
        adapter.prepare_teacher(to_fake(teacher, mode))

        def build(options: StudentOptions) -> nn.Module:
            return _student(adapter, _truncated(self._student(options), depths), teacher, options, mode)

        set_networks(module, teacher, build)

    def _student(self, options: StudentOptions) -> TwoTimeModel:
        """A student of the teacher on the meta device, which shares no weights with it."""
        if options not in self._students:
            with torch.device("meta"):
                self._students[options] = type(self.network).from_config(student_config(self.network.config, options))
        return self._students[options]


def pipeline_networks(adapter: DiffusersAdapter, directory: Path) -> PipelineNetworks:
    """The networks of a pipeline.

    Args:
        adapter: Adapter of the pipeline.
        directory: Directory with the pipeline's configurations.
    """
    kind = adapter.family.network_class
    config: dict[str, Any] = kind.load_config(directory, subfolder="transformer")
    with torch.device("meta"):
        network = kind.from_config(config)
    lists = {name: part for name, part in network.named_children() if isinstance(part, nn.ModuleList)}
    depths = {name: len(part) for name, part in lists.items() if len(part) > MEASURED_BLOCKS + 1 and _has_equal_blocks(part)}
    return PipelineNetworks(network, depths)


def _has_equal_blocks(blocks: nn.ModuleList) -> bool:
    shapes = [[(name, p.shape) for name, p in block.named_parameters()] for block in blocks]
    return all(shape == shapes[0] for shape in shapes) and bool(shapes[0])


def _truncated(network: TwoTimeModel, depths: Mapping[str, int]) -> TwoTimeModel:
    """A copy of a network with fewer blocks in some lists."""
    part = copy.copy(network)
    part._modules = dict(network._modules)
    for name, depth in depths.items():
        part._modules[name] = nn.ModuleList(list(network.get_submodule(name))[:depth])
    return copy.deepcopy(part)


def set_networks(module: TeacherStudentBase, teacher: nn.Module, build: Callable[[StudentOptions], nn.Module]) -> None:
    """Set the teacher of a method, its student, and the auxiliary networks that are built like students.

    Args:
        module: The method.
        teacher: Teacher of the method.
        build: Function that builds a student with some options.
    """
    module.networks.teacher = teacher
    module.networks.student = build(module.student_options)
    for path, options in module.auxiliary_students().items():
        module.set_submodule(path, build(options))


def network_names(module: TeacherStudentBase) -> dict[str, str]:
    """Paths within a method of its teacher, student and auxiliary students, by their names in plans."""
    auxiliary = {path.rpartition(".")[2]: path for path in module.auxiliary_students()}
    return {"teacher": "networks.teacher", "student": "networks.student", **auxiliary}


def _student(
    adapter: DiffusersAdapter, student: TwoTimeModel, teacher: TwoTimeModel, options: StudentOptions, mode: FakeTensorMode
) -> TwoTimeModel:
    """Convert a network on the meta device to a student on fake tensors, as `build_student` builds it, without values."""
    if options.lora is None:
        make_student_trainable(student, options)
    else:
        _share_weights(student, teacher)
        add_lora(student, lora_config(student, options.lora))
    to_fake(student, mode)
    if options.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    adapter.use_attention_backend(student)
    return student.train()


def _share_weights(student: TwoTimeModel, teacher: TwoTimeModel) -> None:
    """Replace the parameters of a student by its teacher's, except those of student-only modules."""
    shared, student_only = dict(teacher.named_parameters()), student_only_prefixes(student)
    for name, _ in list(student.named_parameters()):
        if not name.startswith(student_only):
            path, _, attribute = name.rpartition(".")
            student.get_submodule(path)._parameters[attribute] = shared[name]


@dataclass(frozen=True)
class NetworkSize:
    """Size of a network.

    Attributes:
        parameters: Number of parameters.
        weights: Bytes of the parameters that it shares with no other network.
        trained: Number of trainable parameters.
        largest_block: Bytes of the largest unit that is sharded and gathered together: a block without its experts, or an
            expert.
        rest: Bytes outside all blocks. If there are experts, also those of the largest block without its experts: the block
            remains gathered while its experts are gathered in turn.
        experts: Bytes of all experts.
    """

    parameters: int
    weights: int
    trained: int
    largest_block: int
    rest: int
    experts: int


def network_size(network: nn.Module, shared: nn.Module | None = None) -> NetworkSize:
    """Size of a network.

    Args:
        network: The network.
        shared: Network that may share parameters with it; those are not counted in `weights` and `trained`.
    """
    others = set() if shared is None else {id(p) for p in shared.parameters()}
    own = [p for p in network.parameters() if id(p) not in others]
    all_blocks = blocks(network)
    expert_bytes = [[sum(p.nbytes for p in expert.parameters()) for expert in experts(block)] for block in all_blocks]
    other_bytes = [
        sum(p.nbytes for p in block.parameters()) - sum(part) for block, part in zip(all_blocks, expert_bytes, strict=True)
    ]
    all_experts = sum(map(sum, expert_bytes))
    outside = sum(p.nbytes for p in network.parameters()) - sum(other_bytes) - all_experts
    return NetworkSize(
        parameters=sum(p.numel() for p in network.parameters()),
        weights=sum(p.nbytes for p in own),
        trained=sum(p.numel() for p in own if p.requires_grad),
        largest_block=max(chain(other_bytes, *expert_bytes), default=0),
        rest=outside + (max(other_bytes) if all_experts else 0),
        experts=all_experts,
    )
