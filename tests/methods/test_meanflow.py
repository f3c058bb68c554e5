from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.derivative import time_derivative
from lightning_distill.flow.losses import AdaptiveLoss, PowerLoss
from lightning_distill.flow.path import expand
from lightning_distill.methods import Guidance
from lightning_distill.methods.networks import GuidedCondition
from tests.methods.gaussian_adapter import GAUSSIAN
from tests.methods.gaussian_runs import loader, meanflow, path_states, trainer, unguided

SOLUTIONS = ["discrete", "bootstrapped", "differential"]
Points = tuple[Tensor, Tensor, Tensor, GuidedCondition]


@pytest.fixture
def points() -> Points:
    """States x_t, ends r, starts t and conditions."""
    x_t, t = path_states()
    return x_t, 0.3 * t, t, unguided(16)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"solution": "discrete", "solver": "euler", "solver_steps": 256}, 1e-2),
        ({"solution": "discrete", "solver": "heun", "solver_steps": 64}, 1e-3),
        ({"solution": "discrete", "solver": "midpoint", "solver_steps": 64}, 1e-3),
        ({"solution": "bootstrapped", "solver": "euler", "bootstrap_step": 1e-3}, 1e-3),
        ({"solution": "bootstrapped", "solver": "heun", "bootstrap_step": 0.05}, 1e-3),
        ({"solution": "differential"}, 1e-4),
    ],
)
def test_target_of_exact_student_is_exact_average_velocity(settings: Any, tolerance: float, points: Points) -> None:
    x_t, r, t, condition = points
    _, target, _ = meanflow(**settings).regression(x_t, r, t, condition)
    exact = GAUSSIAN.average_velocity(x_t, r, t)
    assert (target - exact).norm() / exact.norm() < tolerance


def test_discrete_target_is_independent_of_the_student(points: Points) -> None:
    module = meanflow(solution="discrete")
    _, before, _ = module.regression(*points)
    module.student.bias.data += 1
    _, after, _ = module.regression(*points)
    assert torch.equal(before, after)


@pytest.mark.parametrize("solution", SOLUTIONS)
def test_target_at_r_equal_t_is_the_teacher_velocity(solution: str, points: Points) -> None:
    x_t, _, t, condition = points
    _, target, _ = meanflow("small", solution=solution).regression(x_t, t, t, condition)
    torch.testing.assert_close(target, GAUSSIAN.velocity(x_t, t))


def test_bootstrapped_residual_converges_to_the_differential_one(points: Points) -> None:
    x_t, r, t = (each.double() for each in points[:3])
    null = {"caption": torch.zeros(16, dtype=torch.float64)}
    condition = GuidedCondition(null, null, torch.ones(16))
    module = meanflow("small", solution="differential")
    module.student.double()
    u = module.networks.average_velocity(x_t, r, t, condition)
    _, target, _ = module.regression(x_t, r, t, condition)
    differential = u - target
    gaps = []
    for step in (1e-2, 1e-3):
        module.solution, module.bootstrap_step = "bootstrapped", step
        _, target, _ = module.regression(x_t, r, t, condition)
        bootstrapped = (u - target) * expand(t - r, u) / step
        gaps.append(((bootstrapped - differential).norm() / differential.norm()).item())
    assert gaps[1] < 0.15 * gaps[0]
    assert gaps[1] < 1e-2


def test_differential_target_is_the_meanflow_identity(points: Points) -> None:
    x_t, r, t, condition = points
    module = meanflow("small", solution="differential")
    v = GAUSSIAN.velocity(x_t, t)
    _, dudt = time_derivative(lambda x, r, t: module.student(x, r, t, condition.prompts["caption"]), x_t, r, t, v)
    _, target, logs = module.regression(x_t, r, t, condition)
    torch.testing.assert_close(target, v - expand(t - r, x_t) * dudt)
    torch.testing.assert_close(logs["dudt_norm"], dudt.square().mean().sqrt())


def test_tangent_warmup_starts_with_the_teacher_velocity(points: Points, tmp_path: Any) -> None:
    x_t, r, t, condition = points
    module = meanflow("small", solution="differential", tangent_warmup_steps=10)
    _, target, _ = module.regression(x_t, r, t, condition)
    torch.testing.assert_close(target, GAUSSIAN.velocity(x_t, t))
    trainer(tmp_path, max_steps=5, limit_val_batches=0).fit(module, loader())
    assert module.tangent_weight == 0.5


@pytest.mark.parametrize("loss", [PowerLoss(1.0), PowerLoss(2.0), AdaptiveLoss(0.5), AdaptiveLoss(1.0)])
@pytest.mark.parametrize("solution", SOLUTIONS)
def test_training_corrects_a_biased_student(solution: str, loss: Any, tmp_path: Any) -> None:
    module = meanflow(solution=solution, loss=loss, solver_steps=8, optimizer=lambda p: torch.optim.Adam(p, lr=0.05))
    module.student.bias.data += 0.5
    trainer(tmp_path, max_steps=40).fit(module, loader(), loader())
    assert module.student.bias.abs() < 0.25


@pytest.mark.parametrize("solution", SOLUTIONS)
def test_training_in_mixed_precision_changes_finite_weights(solution: str, tmp_path: Any) -> None:
    module = meanflow("small", solution=solution)
    before = [p.clone() for p in module.student.parameters()]
    trainer(tmp_path, precision="bf16-mixed", limit_val_batches=0).fit(module, loader())
    after = list(module.student.parameters())
    assert all(torch.isfinite(p).all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_resumed_run_continues_in_the_saved_phase(tmp_path: Any) -> None:
    module = meanflow("small", solution="bootstrapped")
    run = trainer(tmp_path)
    run.fit(module, loader(), loader())
    module.solution = "differential"
    run.save_checkpoint(tmp_path / "last.ckpt")
    resumed = meanflow("small", solution="bootstrapped", tangent_warmup_steps=8)
    trainer(tmp_path, max_steps=6).fit(resumed, loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.solution == "differential"
    assert resumed.tangent_weight == pytest.approx((6 - 4) / 8)


def test_a_solution_that_is_configured_at_a_resume_counts(tmp_path: Any) -> None:
    run = trainer(tmp_path, max_steps=2)
    run.fit(meanflow("small", solution="discrete"), loader(), loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    resumed = meanflow("small", solution="differential", tangent_warmup_steps=4)
    trainer(tmp_path, max_steps=3).fit(resumed, loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.solution == "differential"
    assert resumed.tangent_weight == 0.25  # the warm-up starts at the resume


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"solution": "exact"}, "model.solution"),
        ({"equal_fraction": 1.5}, "model.equal_fraction"),
        ({"solver": "rk4"}, "model.solver"),
        ({"solver_steps": 0}, "model.solver_steps"),
        ({"bootstrap_step": 0.0}, "model.bootstrap_step"),
        ({"trajectory_fraction": 1.1}, "model.trajectory_fraction"),
        ({"trajectory_steps": 0}, "model.trajectory_steps"),
        ({"trajectory_source": "data"}, "model.trajectory_source"),
        ({"tangent_warmup_steps": -1}, "model.tangent_warmup_steps"),
        ({"caption_dropout": 1.0}, "model.caption_dropout"),
        ({"ema_decay": 1.0}, "model.ema_decay"),
        ({"guidance": Guidance(kind="improved")}, "caption_dropout"),
        ({"guidance": Guidance(kind="improved"), "caption_dropout": 0.1, "equal_fraction": 0.0}, "equal_fraction"),
        ({"guidance": Guidance(kind="embedded")}, "guidance.kind"),
    ],
)
def test_error_for_invalid_settings_names_the_setting(settings: Any, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        meanflow(**settings)
