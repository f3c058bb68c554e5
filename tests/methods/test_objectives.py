"""Objectives of all methods: evaluation without a Trainer, auxiliary losses, and expected numbers of network calls."""

import inspect
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_distill.methods as methods
from lightning_distill.methods import (
    DMD2,
    IMM,
    LADD,
    SCM,
    TDM,
    AuxiliaryLoss,
    ConsistencyDistillation,
    CriticGan,
    FlowMatching,
    Guidance,
    KnowledgeDistillation,
    MeanFlow,
    Objective,
    PiFlow,
    SplitMeanFlow,
    TeacherStudentBase,
    TimestepRescaling,
    TrajectoryAlignment,
)
from lightning_distill.teachers.student_options import StudentOptions
from tests.methods.gaussian_adapter import AnyStudentAdapter
from tests.methods.gaussian_runs import VALIDATION, build

Case = tuple[type[TeacherStudentBase], dict[str, Any]]

ALL_METHODS = [
    each
    for each in vars(methods).values()
    if inspect.isclass(each) and issubclass(each, TeacherStudentBase) and each is not TeacherStudentBase
]
NEEDED: dict[type[TeacherStudentBase], dict[str, Any]] = {
    PiFlow: {"student": StudentOptions(policy_points=4)},
    TimestepRescaling: {"student": StudentOptions(time_embedding="rescaled")},
    LADD: {"hidden": 8, "teacher_steps": 2},
}
"""Settings without which a method raises, or is slow."""
GAN = CriticGan(hidden=8)
WITH_AUXILIARY_NETWORKS: dict[str, Case] = {
    "MeanFlow-alignment": (MeanFlow, {"alignment": TrajectoryAlignment(critic_updates=2)}),
    "SCM": (SCM, {}),
    "DMD2": (DMD2, {"critic_updates": 2}),
    "DMD2-gan": (DMD2, {"critic_updates": 2, "gan": GAN}),
    "TDM": (TDM, {"critic_updates": 2}),
    "LADD": (LADD, {}),
}


def method(kind: type[TeacherStudentBase], **settings: Any) -> Any:
    adapter = AnyStudentAdapter("small", teacher="small")
    return build(kind(adapter, validation=VALIDATION, **(NEEDED.get(kind, {}) | settings)))


def batch(size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents (B, 3, 2, 2) and conditions."""
    return torch.randn(size, 3, 2, 2), {"caption": torch.rand(size)}


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("kind", ALL_METHODS, ids=lambda kind: kind.__name__)
def test_objective_evaluates_without_trainer(kind: type[TeacherStudentBase]) -> None:
    module = method(kind)
    objective = module.evaluate_objective(*batch(8))
    assert objective.loss.shape == objective.t.shape == (8,)
    assert objective.loss.isfinite().all()
    assert all(value.isfinite() for value in objective.logs.values())
    objective.loss.mean().backward()
    gradients = [parameter.grad for parameter in module.student.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
    assert not kind.has_teacher or all(parameter.grad is None for parameter in module.teacher.parameters())


@pytest.mark.parametrize("kind", ALL_METHODS, ids=lambda kind: kind.__name__)
def test_only_methods_with_auxiliary_networks_yield_losses(kind: type[TeacherStudentBase]) -> None:
    module = method(kind)
    assert isinstance(module.objective(*batch(8)), Objective) is not bool(module.auxiliary.paths)


@pytest.mark.parametrize("case", WITH_AUXILIARY_NETWORKS)
def test_objective_itself_changes_no_weights(case: str) -> None:
    kind, settings = WITH_AUXILIARY_NETWORKS[case]
    module = method(kind, **settings)
    before = parameters_of(module)
    losses: list[AuxiliaryLoss] = list(module.objective(*batch(8)))
    assert {loss.network for loss in losses} == set(module.auxiliary.paths)
    assert all(loss.loss.ndim == 0 and loss.loss.requires_grad for loss in losses)
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())


@pytest.mark.parametrize("case", WITH_AUXILIARY_NETWORKS)
def test_evaluation_steps_auxiliary_networks_only(case: str) -> None:
    kind, settings = WITH_AUXILIARY_NETWORKS[case]
    module = method(kind, **settings)
    before = parameters_of(module)
    module.evaluate_objective(*batch(8))
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert {path for path in module.auxiliary.paths if any(name.startswith(f"{path}.") for name in changed)} == set(
        module.auxiliary.paths
    )
    assert all(name.startswith(tuple(f"{path}." for path in module.auxiliary.paths)) for name in changed)


# Expected numbers of network calls

BATCH_SIZE = 64
"""Large enough that a batch has rows of all kinds."""
RANDOM_EVALUATIONS = 110
"""Number of evaluations of an objective with a random number of calls."""
IMPROVED: dict[str, Any] = {"guidance": Guidance(kind="improved"), "caption_dropout": 0.1}
TRAJECTORY: dict[str, Any] = {"trajectory_fraction": 0.5, "trajectory_steps": 3}
MEANFLOW: dict[str, dict[str, Any]] = {
    "MeanFlow": {},
    "MeanFlow-guidance": {"guidance": Guidance(scale=2.0)},
    "MeanFlow-improved": IMPROVED,
    "MeanFlow-equal_fraction_0": {"equal_fraction": 0.0},
    "MeanFlow-equal_fraction_1": {"equal_fraction": 1.0},
    "MeanFlow-finite_difference": {"derivative": "finite_difference"},
    "MeanFlow-student_trajectories": TRAJECTORY,
    "MeanFlow-teacher_trajectories": TRAJECTORY | {"trajectory_source": "teacher"},
    "MeanFlow-improved-teacher_trajectories": TRAJECTORY | IMPROVED | {"trajectory_source": "teacher"},
    "MeanFlow-alignment": {"alignment": TrajectoryAlignment(nfe=(1, 2, 4), critic_updates=2)},
    "MeanFlow-improved-alignment": IMPROVED | {"alignment": TrajectoryAlignment(nfe=(1, 2, 4))},
    "MeanFlow-guided_alignment": {"alignment": TrajectoryAlignment(nfe=(1, 2, 2), guidance_scale=3.0)},
}
CASES: dict[str, Case] = {
    **{name: (MeanFlow, {"solver": "heun", "solver_steps": 2} | settings) for name, settings in MEANFLOW.items()},
    "SplitMeanFlow": (SplitMeanFlow, {}),
    "SplitMeanFlow-improved": (SplitMeanFlow, IMPROVED),
    "SplitMeanFlow-trajectories": (SplitMeanFlow, TRAJECTORY | {"trajectory_source": "teacher"}),
    "IMM-teacher_bridge": (IMM, {"solver": "heun"}),
    "IMM-data_bridge": (IMM, {"bridge": "data"}),
    "IMM-trajectories": (IMM, TRAJECTORY),
    "ConsistencyDistillation": (ConsistencyDistillation, {}),
    "ConsistencyDistillation-ema": (ConsistencyDistillation, {"target": "ema", "ema_decay": 0.9}),
    "ConsistencyDistillation-trajectories": (ConsistencyDistillation, TRAJECTORY | {"solver": "euler"}),
    "KnowledgeDistillation": (KnowledgeDistillation, {"nfe": (1, 2, 4), "solver_steps": 2}),
    "PiFlow": (PiFlow, {"nfe": (1, 2, 4)}),
    "PiFlow-student_trajectories": (PiFlow, TRAJECTORY | {"nfe": (1, 2, 4)}),
    "PiFlow-teacher_trajectories": (PiFlow, TRAJECTORY | {"nfe": (1, 2, 4), "trajectory_source": "teacher"}),
    **{f"PiFlow-one_step-{n}": (PiFlow, TRAJECTORY | {"nfe": (1,), "trajectory_steps": n}) for n in (1, 3, 9)},
    "SCM": (SCM, {}),
    "SCM-finite_difference": (SCM, {"derivative": "finite_difference"}),
    "SCM-trajectories": (SCM, TRAJECTORY),
    "TimestepRescaling": (TimestepRescaling, {}),
    "TimestepRescaling-improved": (TimestepRescaling, IMPROVED),
    "DMD2": (DMD2, {"nfe": (1, 2, 4), "critic_updates": 2}),
    "DMD2-gan": (DMD2, {"nfe": (1, 2, 4), "critic_updates": 2, "gan": GAN}),
    "DMD2-gan-heads_alone": (DMD2, {"critic_updates": 2, "gan": CriticGan(hidden=8, critic_weight=0.0)}),
    "DMD2-gan-forward_kl": (DMD2, {"critic_updates": 2, "gan": CriticGan(hidden=8, divergence="forward_kl")}),
    "TDM": (TDM, {"nfe": (1, 2, 4), "critic_updates": 2}),
    "LADD-teacher": (LADD, {"guidance": Guidance(scale=2.0)}),
    "LADD-data": (LADD, {"real": "data"}),
}
PHASES = [(case, phase) for case, (kind, _) in CASES.items() for phase in kind.phases]


def count_calls(module: Any) -> Counter[str]:
    """Counts the calls of each network from now on, as the planner does; the counter is the result."""
    counter: Counter[str] = Counter()

    def counting(name: str) -> Any:
        def count(network: nn.Module, args: Any) -> None:
            counter[name] += 1
            if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in network.parameters()):
                counter[f"{name}_backward"] += 1

        return count

    auxiliary = {path.rpartition(".")[2]: path for path in module.auxiliary_students()}
    for name, path in {"teacher": "networks.teacher", "student": "networks.student", **auxiliary}.items():
        module.get_submodule(path).register_forward_pre_hook(counting(name))
    if module.ema is not None:
        module.ema.module.register_forward_pre_hook(counting("student"))  # a call of the EMA counts as one of the student
    return counter


def evaluate_calls(module: Any, counter: Counter[str], evaluations: int) -> list[Counter[str]]:
    """Numbers of calls in each of several evaluations of the objective."""
    counts = []
    for _ in range(evaluations):
        counter.clear()
        module.evaluate_objective(*batch(BATCH_SIZE))
        counts.append(Counter(counter))
    return counts


@pytest.mark.parametrize(("case", "phase"), PHASES)
def test_expected_calls_are_the_mean_of_counted_calls(case: str, phase: str) -> None:
    kind, settings = CASES[case]
    module = method(kind, **settings)
    module.phase = phase
    expected = module.expected_calls(phase)
    counter = count_calls(module)
    counts = evaluate_calls(module, counter, 10)
    if any(count != counts[0] for count in counts):
        counts += evaluate_calls(module, counter, RANDOM_EVALUATIONS)
    for name in set(expected).union(*counts):
        values = torch.tensor([float(count[name]) for count in counts])
        standard_error = values.std().item() / len(counts) ** 0.5
        assert expected.get(name, 0) == pytest.approx(values.mean().item(), abs=3 * standard_error + 1e-6), name
    if case.startswith("PiFlow-one_step"):
        assert expected["student"] == expected["student_backward"] == 1


def test_method_without_expected_calls_has_the_same_calls_in_every_step() -> None:
    module = build(FlowMatching(AnyStudentAdapter(teacher="small"), validation=VALIDATION))
    assert module.expected_calls("training") is None
    counted: list[int] = []
    module.student.register_forward_pre_hook(lambda network, args: counted.append(len(args[0])))
    for _ in range(3):
        module.evaluate_objective(*batch(BATCH_SIZE))
    assert counted == [BATCH_SIZE] * 3
