"""Measured training steps on fake tensors: memory, network calls, and extrapolation to all blocks."""

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
from lightning_distill.planning.memory_tracker import MemoryTracker
from lightning_distill.planning.step import BatchShape, StepCost, measure_step
from lightning_distill.teachers import DiffusersAdapter
from lightning_distill.teachers.embedded import build_flux_pipeline
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from tests.tiny import WORDS, save_tiny_pipeline, tiny_vae


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX pipeline with five joint and four single blocks; the planner measures a few of them."""
    directory = tmp_path_factory.mktemp("teacher")
    build_flux_pipeline(tiny_vae(), WORDS, num_layers=5, num_single_layers=4, num_attention_heads=2).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX pipeline with one block of each kind, which is measured in one step."""
    return Path(save_tiny_pipeline(tmp_path_factory.mktemp("shallow")))


def measure(
    directory: Path, phases: list[str], optimizer: Any = torch.optim.AdamW, aligned: bool = True, **options: object
) -> tuple[MeanFlow, StepCost]:
    adapter = DiffusersAdapter(str(directory))
    adapter.check()
    module = MeanFlow(
        adapter,
        guidance=Guidance("two_branch", 2.0),
        student=StudentOptions(**options),  # type: ignore[arg-type]
        alignment=TrajectoryAlignment(nfe=(1, 3)) if aligned else None,
        solver_steps=3 if aligned else 1,
        ema_decay=0.9,
        optimizer=optimizer,
    )
    return module, measure_step(module, directory, BatchShape(2, (32, 32)), phases)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_extrapolation_from_few_blocks_matches_all_blocks(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    _, few = measure(pipeline, ["differential"], gradient_checkpointing=checkpointing)
    monkeypatch.setattr(networks, "MEASURED_BLOCKS", 9)  # no list has more blocks
    _, full = measure(pipeline, ["differential"], gradient_checkpointing=checkpointing)
    assert few.numbers.keys() == full.numbers.keys()
    for name, value in full.numbers.items():
        exact = not name.startswith("pass")
        assert few.numbers[name] == pytest.approx(value, rel=1e-9 if exact else 0.02), name


def test_weights_match_the_networks_of_a_training(pipeline: Path) -> None:
    module, cost = measure(pipeline, ["discrete"], aligned=False, lora=LoraOptions(rank=2))
    adapter = DiffusersAdapter(str(pipeline))
    adapter.load()
    teacher = adapter.load_teacher()
    student, _ = adapter.build_student(teacher, module.student_options)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert cost.numbers["parameters/teacher"] == sum(p.numel() for p in teacher.parameters())
    assert cost.numbers["trained/student"] == trained
    assert cost.numbers["weights/student"] == 4 * trained  # it shares the others with the teacher
    assert cost.numbers["state/student"] == 8 * trained
    encoders = sum(p.numel() for part in adapter.text_encoders().values() for p in part.parameters())
    assert cost.numbers["parameters/text_encoders"] == encoders


def test_network_calls_of_meanflow_with_alignment(shallow: Path) -> None:
    _, cost = measure(shallow, ["discrete"], lora=LoraOptions(rank=2))
    # Teacher: three steps of the discrete solution, one call where r = t, one of the alignment. Trajectories of one and of
    # three steps have 1.5 student calls in the mean.
    assert cost.calls["discrete"]["teacher"] == 5
    assert cost.calls["discrete"]["student"] == 1 + 1.5


@pytest.mark.parametrize(
    ("method", "settings", "teacher", "student"),
    [
        (ConsistencyDistillation, {"solver": "heun"}, 2, 2),
        (ConsistencyDistillation, {"solver": "heun", "target": "ema", "ema_decay": 0.9}, 2, 2),
        (SplitMeanFlow, {"equal_fraction": 0.5}, 1, 3),
        (SplitMeanFlow, {"guidance": Guidance("improved"), "caption_dropout": 0.1}, 1, 3 + 2),
        (SCM, {}, 1, 1),
        (SCM, {"derivative": "finite_difference"}, 1, 3),
        (IMM, {"particles": 2}, 1, 2),
        (PiFlow, {"states": 3, "student": StudentOptions(policy_points=4)}, 3, 1),
        # two intervals in the mean, with 3 Euler steps or 2 Heun steps each
        (KnowledgeDistillation, {"nfe": (1, 3), "solver": "euler", "solver_steps": 3}, 6, 1),
        (KnowledgeDistillation, {"nfe": (2,), "solver": "heun", "solver_steps": 2}, 8, 1),
    ],
)
def test_network_calls_of_each_method(
    shallow: Path, method: type[TeacherStudentBase], settings: dict[str, object], teacher: int, student: int
) -> None:
    adapter = DiffusersAdapter(str(shallow))
    adapter.check()
    module = method(adapter, **{"guidance": Guidance("two_branch", 2.0), **settings})
    cost = measure_step(module, shallow, BatchShape(2, (32, 32)), ["training"])
    assert cost.calls["training"] == {"teacher": teacher, "student": student, "student_backward": 1}


@pytest.mark.parametrize(
    ("nfe", "trajectory_steps", "student"),
    [
        # A grid of one step has no earlier steps, whatever the largest number of trajectory steps.
        ((1,), 1, 1),
        ((1,), 3, 1),
        ((1,), 9, 1),
        # Trajectories of PiFlow are the earlier steps of its grid: none or three, 1.5 in the mean.
        ((1, 4), 3, 1 + 1.5),
    ],
)
def test_student_trajectories_of_pi_flow_follow_its_grid(
    shallow: Path, nfe: tuple[int, ...], trajectory_steps: int, student: float
) -> None:
    adapter = DiffusersAdapter(str(shallow))
    adapter.check()
    module = PiFlow(
        adapter,
        guidance=Guidance("two_branch", 2.0),
        student=StudentOptions(policy_points=4),
        nfe=nfe,
        states=2,
        trajectory_fraction=0.5,
        trajectory_steps=trajectory_steps,
    )
    cost = measure_step(module, shallow, BatchShape(2, (32, 32)), ["training"])
    assert cost.calls["training"] == {"teacher": 2, "student": student, "student_backward": 1}


@pytest.mark.parametrize("method", [DMD2, TDM])
def test_network_calls_of_methods_with_a_critic(shallow: Path, method: type[DMD2 | TDM]) -> None:
    adapter = DiffusersAdapter(str(shallow))
    adapter.check()
    module = method(adapter, guidance=Guidance("two_branch", 2.0), nfe=(1, 3), critic_updates=3)
    cost = measure_step(module, shallow, BatchShape(2, (32, 32)), ["training"])
    # Each critic update samples a new state, after 1.5 student steps from noise in the mean. The student's loss uses the last.
    calls = {"teacher": 1, "student": 3 * 1.5, "student_backward": 1, "critic": 3 + 1, "critic_backward": 3}
    assert cost.calls["training"] == calls
    assert cost.numbers["trained/critic"] == cost.numbers["parameters/critic"] > 0
    assert cost.numbers["pass/training/1"] > 2 * 4 * cost.numbers["trained/student"]  # gradients of student and critic


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


def test_optimizer_state_matches_a_real_step(shallow: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, cost = measure(shallow, ["discrete"], aligned=False, optimizer=kind)
    adapter = DiffusersAdapter(str(shallow))
    adapter.load()
    student, _ = adapter.build_student(adapter.load_teacher(), module.student_options)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    optimizer = kind(list(student.parameters()))
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {id(part): part for values in optimizer.state.values() for value in values.values() for part in parts(value)}
    # The estimate lacks the step counts, one number per parameter.
    assert cost.numbers["state/student"] == pytest.approx(sum(part.nbytes for part in state.values()), rel=1e-3)


def test_tracker_counts_live_storages() -> None:
    with FakeTensorMode():
        x = torch.empty(256, requires_grad=True)
    tracker = MemoryTracker((1, 2))
    with tracker:
        y = x * 2
        assert tracker.live == 1024
        z = y.view(16, 16)  # a view of the same storage
        del y
        assert tracker.live == 1024
        del z
    assert tracker.live == 0
    assert tracker.peaks == {1: 1024, 2: 1024}
    tracker.update_peaks(1000, sharded=True)
    assert tracker.peaks == {1: 1024, 2: 1024}


def test_gradients_are_divided_over_shards() -> None:
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.empty(512))
    tracker = MemoryTracker((1, 4))
    tracker.track_gradients([weight])
    with tracker:
        weight.square().sum().backward()
    assert weight.grad is None
    assert tracker.gradients == 2048
    tracker.update_peaks(10_000)
    assert tracker.peaks == {1: 12_048, 4: 10_512}
