"""A teacher, its student, critic and average without memory, of as many blocks as are asked for."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.planning.description import to_fake
from lightning_distill.sharding.blocks import blocks, experts
from lightning_distill.students.lora_student import add_lora, student_only_prefixes
from lightning_distill.students.two_time import TwoTimeModel
from lightning_distill.teachers.diffusers_adapter import DTYPES, DiffusersAdapter
from lightning_distill.teachers.student import lora_config, make_trainable, student_config
from lightning_distill.teachers.student_options import StudentOptions

FEW = 2
"""Blocks of each kind that a step is measured with; a block more tells what each of the others adds."""


@dataclass(frozen=True)
class Stacks:
    """A network on the meta device, and its lists of equal blocks.

    Attributes:
        whole: The network.
        depths: Number of blocks of each list that is longer than the step is measured with.
    """

    whole: TwoTimeModel
    depths: dict[str, int]
    _students: dict[StudentOptions, "Stacks"] = field(default_factory=dict, repr=False)

    def student(self, options: StudentOptions) -> "Stacks":
        """A student of this teacher; its weights are its own."""
        if options not in self._students:
            with torch.device("meta"):
                whole = type(self.whole).from_config(student_config(self.whole.config, options))
            self._students[options] = Stacks(whole, self.depths)
        return self._students[options]

    def of(self, depths: Mapping[str, int]) -> TwoTimeModel:
        """A copy with fewer blocks in some lists."""
        part = copy.copy(self.whole)
        part._modules = dict(self.whole._modules)
        for name, depth in depths.items():
            part._modules[name] = nn.ModuleList(list(self.whole.get_submodule(name))[:depth])
        return copy.deepcopy(part)


def stacks(adapter: DiffusersAdapter, directory: Path) -> Stacks:
    """The teacher of a pipeline whose configuration is in a directory."""
    kind = adapter.family.network_class
    config: dict[str, Any] = kind.load_config(directory, subfolder="transformer")
    with torch.device("meta"):
        whole = kind.from_config(config)
    listed = {name: part for name, part in whole.named_children() if isinstance(part, nn.ModuleList)}
    return Stacks(whole, {name: len(part) for name, part in listed.items() if len(part) > FEW + 1 and _equal(part)})


def _equal(listed: nn.ModuleList) -> bool:
    shapes = [[(name, p.shape) for name, p in block.named_parameters()] for block in listed]
    return all(shape == shapes[0] for shape in shapes) and bool(shapes[0])


def build_networks(module: TeacherStudentBase, found: Stacks, depths: Mapping[str, int], mode: FakeTensorMode) -> None:
    """Give a method its networks, in the place of `build_networks`, without memory and without an average."""
    adapter = module.adapter
    assert isinstance(adapter, DiffusersAdapter)
    teacher = found.of(depths)
    nn.Module.to(teacher, DTYPES[adapter.torch_dtype])  # diffusers' own warns of what stays in float32
    adapter.prepare_teacher(to_fake(teacher, mode))

    def build(options: StudentOptions) -> nn.Module:
        return _student(adapter, found, depths, teacher, options, mode)

    set_networks(module, teacher, build)


def set_networks(module: TeacherStudentBase, teacher: nn.Module, build: Callable[[StudentOptions], nn.Module]) -> None:
    """Set the teacher of a method, its student and the auxiliary networks that are built like students.

    Args:
        module: The method.
        teacher: Its teacher.
        build: Function that builds a student of these options.
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
    adapter: DiffusersAdapter,
    found: Stacks,
    depths: Mapping[str, int],
    teacher: TwoTimeModel,
    options: StudentOptions,
    mode: FakeTensorMode,
) -> TwoTimeModel:
    """As `build_student` makes it, but for the values."""
    student = found.student(options).of(depths)
    if options.lora is None:
        make_trainable(student)
    else:
        _share(student, teacher)
        add_lora(student, lora_config(student, options.lora))
    to_fake(student, mode)
    if options.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    adapter.use_attention_backend(student)
    return student.train()


def _share(student: TwoTimeModel, teacher: TwoTimeModel) -> None:
    """Put the teacher's parameters into a student, but for those of its own parts."""
    known, own = dict(teacher.named_parameters()), student_only_prefixes(student)
    for name, _ in list(student.named_parameters()):
        if not name.startswith(own):
            path, _, attribute = name.rpartition(".")
            student.get_submodule(path)._parameters[attribute] = known[name]


@dataclass(frozen=True)
class Sizes:
    """Of a network: bytes, and the largest that is gathered at a time.

    Attributes:
        parameters: Number of parameters.
        weights: Bytes of those that it shares with no other.
        trained: Number of those that train.
        largest_block: Bytes of the largest of the parts that are sharded together.
        rest: Bytes outside all blocks, and of a block around experts, which are sharded by themselves.
        experts: Bytes of all experts.
    """

    parameters: int
    weights: int
    trained: int
    largest_block: int
    rest: int
    experts: int


def sizes(network: nn.Module, shared: nn.Module | None = None) -> Sizes:
    """Of a network, some of whose parameters may be another's."""
    known = set() if shared is None else {id(p) for p in shared.parameters()}
    own = [p for p in network.parameters() if id(p) not in known]
    found = blocks(network)
    within = [[sum(p.nbytes for p in expert.parameters()) for expert in experts(block)] for block in found]
    around = [sum(p.nbytes for p in block.parameters()) - sum(part) for block, part in zip(found, within, strict=True)]
    apart = sum(map(sum, within))
    return Sizes(
        parameters=sum(p.numel() for p in network.parameters()),
        weights=sum(p.nbytes for p in own),
        trained=sum(p.numel() for p in own if p.requires_grad),
        largest_block=max(chain(around, *within), default=0),
        rest=sum(p.nbytes for p in network.parameters()) - sum(around) - apart + (max(around) if apart else 0),
        experts=apart,
    )
