"""The step that is run without memory: it is the method's own, and few blocks tell what many take."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import lightning_distill.planning.networks as networks
from lightning_distill.methods import (
    DMD2,
    IMM,
    SCM,
    TDM,
    ConsistencyDistillation,
    KnowledgeDistillation,
    MeanFlow,
    PiFlow,
    SplitMeanFlow,
    TeacherStudentBase,
    TrajectoryAlignment,
)
from lightning_distill.methods.guidance import Guidance
from lightning_distill.planning.ledger import Ledger
from lightning_distill.planning.step import Batch, StepCost, measure_step
from lightning_distill.teachers import DiffusersAdapter
from lightning_distill.teachers.embedded import build_flux_pipeline
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from tests.tiny import WORDS, tiny_vae


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five joint and four single blocks."""
    directory = tmp_path_factory.mktemp("teacher")
    build_flux_pipeline(tiny_vae(), WORDS, num_layers=5, num_single_layers=4, num_attention_heads=2).save_pretrained(directory)
    return directory


def measure(
    directory: Path, phases: list[str], optimizer: Any = torch.optim.AdamW, **options: object
) -> tuple[MeanFlow, StepCost]:
    adapter = DiffusersAdapter(str(directory))
    adapter.check()
    module = MeanFlow(
        adapter,
        guidance=Guidance("two_branch", 2.0),
        student=StudentOptions(**options),  # type: ignore[arg-type]
        alignment=TrajectoryAlignment(nfe=(1, 3)),
        solver_steps=3,
        ema_decay=0.9,
        optimizer=optimizer,
    )
    return module, measure_step(module, directory, Batch(2, (32, 32)), phases)


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_few_blocks_tell_what_all_take(pipeline: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool) -> None:
    _, few = measure(pipeline, ["differential"], gradient_checkpointing=checkpointing)
    monkeypatch.setattr(networks, "FEW", 9)  # no list is longer
    _, whole = measure(pipeline, ["differential"], gradient_checkpointing=checkpointing)
    assert few.numbers.keys() == whole.numbers.keys()
    for name, value in whole.numbers.items():
        exact = not name.startswith("pass")
        assert few.numbers[name] == pytest.approx(value, rel=1e-9 if exact else 0.02), name


def test_it_counts_the_weights_that_training_has(pipeline: Path) -> None:
    module, cost = measure(pipeline, ["discrete"], lora=LoraOptions(rank=2))
    adapter = DiffusersAdapter(str(pipeline))
    adapter.load()
    teacher = adapter.load_teacher()
    student, _ = adapter.build_student(teacher, module.student_options)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert cost.numbers["parameters/teacher"] == sum(p.numel() for p in teacher.parameters())
    assert cost.numbers["trained/student"] == trained
    assert cost.numbers["weights/student"] == 4 * trained  # the rest is the teacher's
    assert cost.numbers["state/student"] == 8 * trained
    encoders = sum(p.numel() for part in adapter.text_encoders().values() for p in part.parameters())
    assert cost.numbers["parameters/text_encoders"] == encoders
    # Three of the solution, one where r = t, one of the alignment; trajectories of one and of three jumps have 1.5 in the mean.
    assert cost.calls["discrete"]["teacher"] == 5
    assert cost.calls["discrete"]["student"] == 1 + 1.5


@pytest.mark.parametrize(
    ("method", "settings", "teacher", "student"),
    [
        (ConsistencyDistillation, {"solver": "heun"}, 2, 2),
        (SplitMeanFlow, {"equal_fraction": 0.5}, 1, 3),
        (SCM, {}, 1, 1),
        (IMM, {"particles": 2}, 1, 2),
        (PiFlow, {"states": 3, "student": StudentOptions(policy_points=4)}, 3, 1),
        # of two segments in the mean, 3 Euler steps or 2 Heun steps each
        (KnowledgeDistillation, {"nfe": (1, 3), "solver": "euler", "solver_steps": 3}, 6, 1),
        (KnowledgeDistillation, {"nfe": (2,), "solver": "heun", "solver_steps": 2}, 8, 1),
    ],
)
def test_it_counts_the_calls_of_every_method(
    pipeline: Path, method: type[TeacherStudentBase], settings: dict[str, object], teacher: int, student: int
) -> None:
    adapter = DiffusersAdapter(str(pipeline))
    adapter.check()
    module = method(adapter, guidance=Guidance("two_branch", 2.0), **settings)
    cost = measure_step(module, pipeline, Batch(2, (32, 32)), ["training"])
    assert cost.calls["training"] == {"teacher": teacher, "student": student, "student_backward": 1}


@pytest.mark.parametrize("method", [DMD2, TDM])
def test_it_counts_the_calls_of_methods_with_a_critic(pipeline: Path, method: type[DMD2 | TDM]) -> None:
    adapter = DiffusersAdapter(str(pipeline))
    adapter.check()
    module = method(adapter, guidance=Guidance("two_branch", 2.0), nfe=(1, 3), critic_updates=3)
    cost = measure_step(module, pipeline, Batch(2, (32, 32)), ["training"])
    # Each update of the critic is on a state of its own, 1.5 jumps from noise in the mean; then the student's own loss.
    calls = {"teacher": 1, "student": 3 * 1.5, "student_backward": 1, "critic": 3 + 1, "critic_backward": 3}
    assert cost.calls["training"] == calls
    assert cost.numbers["trained/critic"] == cost.numbers["parameters/critic"] > 0
    assert cost.numbers["pass/training/1"] > 2 * 4 * cost.numbers["trained/student"]  # gradients of both


def parts(x: Tensor) -> Iterator[Tensor]:
    if is_traceable_wrapper_subclass(x):
        for name in x.__tensor_flatten__()[0]:
            yield from parts(getattr(x, name))
    else:
        yield x


@pytest.fixture(params=["8bit", "fused"])
def kind(request: pytest.FixtureRequest) -> Any:
    if request.param == "8bit":
        return request.getfixturevalue("adamw_8bit")
    return lambda groups: torch.optim.AdamW(groups, fused=True)


def test_it_counts_what_an_optimizer_keeps(pipeline: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, cost = measure(pipeline, ["discrete"], optimizer=kind)
    adapter = DiffusersAdapter(str(pipeline))
    adapter.load()
    student, _ = adapter.build_student(adapter.load_teacher(), module.student_options)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    optimizer = kind(list(student.parameters()))
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = {id(part): part for state in optimizer.state.values() for value in state.values() for part in parts(value)}
    # But for the counts of steps, a number for each weight.
    assert cost.numbers["state/student"] == pytest.approx(sum(part.nbytes for part in kept.values()), rel=1e-3)


def test_the_ledger_knows_what_is_alive() -> None:
    with FakeTensorMode():
        x = torch.empty(256, requires_grad=True)
    ledger = Ledger((1, 2))
    with ledger:
        y = x * 2
        assert ledger.live == 1024
        z = y.view(16, 16)  # the same memory
        del y
        assert ledger.live == 1024
        del z
    assert ledger.live == 0
    assert ledger.peaks == {1: 1024, 2: 1024}
    ledger.note(1000, divided=True)
    assert ledger.peaks == {1: 1024, 2: 1024}


def test_gradients_are_divided_among_processes() -> None:
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.empty(512))
    ledger = Ledger((1, 4))
    ledger.take_gradients([weight])
    with ledger:
        weight.square().sum().backward()
    assert weight.grad is None
    assert ledger.gradients == 2048
    ledger.note(10_000)
    assert ledger.peaks == {1: 12_048, 4: 10_512}
