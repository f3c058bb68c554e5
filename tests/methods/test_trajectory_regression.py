"""Training states on trajectories from noise, of all methods that regress at states x_t."""

from typing import Any

import pytest
import torch

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods import IMM, SCM, ConsistencyDistillation, MeanFlow, SplitMeanFlow, TrajectoryAlignment
from lightning_distill.methods.trajectory_regression import TrajectoryRegression
from tests.methods.gaussian_adapter import GAUSSIAN, GaussianAdapter
from tests.methods.gaussian_runs import VALIDATION, Captions, build, empty_captions, meanflow, trainer, unguided

KINDS: dict[str, tuple[type[TrajectoryRegression], dict[str, Any]]] = {
    "SCM": (SCM, {"tangent_warmup_steps": 0}),
    "ConsistencyDistillation": (ConsistencyDistillation, {"teacher_step": 0.125}),
    "SplitMeanFlow": (SplitMeanFlow, {}),
    "IMM": (IMM, {"decrement_exponent": 7, "solver": "heun"}),
}


def method(kind: str, **settings: Any) -> Any:
    method_class, usual = KINDS[kind]
    return build(method_class(GaussianAdapter("exact"), validation=VALIDATION, **(usual | settings)))


@pytest.mark.parametrize(("source", "steps", "tolerance"), [("student", 1, 1e-4), ("student", 3, 1e-4), ("teacher", 64, 0.05)])
def test_trajectory_states_equal_the_teacher_flow_map(source: str, steps: int, tolerance: float) -> None:
    """Steps of the exact student have no error, and many steps of the teacher have a small one."""
    module = meanflow(trajectory_source=source, trajectory_steps=steps, solver="heun")
    noise, t = torch.randn(16, 3, 4, 4), torch.linspace(0, 1, 16)
    for seed in range(4):
        torch.manual_seed(seed)
        x_t = module.roll_out(noise, t, unguided(16))
        torch.testing.assert_close(x_t, GAUSSIAN.flow_map(noise, torch.ones(16), t), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("steps", [1, 3])
def test_stochastic_trajectory_states_have_the_distribution_of_noised_data(steps: int) -> None:
    module = method("SCM", trajectory_steps=steps)
    noise = torch.randn(4096, 3, 4, 4)
    for seed, end in enumerate((0.1, 0.5, 0.9, 1.0)):
        torch.manual_seed(seed)
        x_t = module.roll_out(noise, torch.full((4096,), end), unguided(4096))
        assert x_t.mean() == pytest.approx((1 - end) * GAUSSIAN.mean, abs=0.02)
        assert x_t.std() == pytest.approx(((1 - end) ** 2 * GAUSSIAN.std**2 + end**2) ** 0.5, abs=0.02)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_trajectory_fraction_is_the_share_of_trajectory_states(fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    module = meanflow("small", trajectory_fraction=fraction, trajectory_steps=1)
    states = {}

    def regression(x_t: Any, r: Any, t: Any, condition: Any) -> Any:
        states.update(x_t=x_t.clone(), t=t)
        return torch.zeros_like(x_t), torch.zeros_like(x_t), {}

    monkeypatch.setattr(module, "regression", regression)
    x0 = torch.full((512, 3, 4, 4), 1e4)  # far from all trajectories
    module.objective(x0, empty_captions(512))
    from_data = states["x_t"].flatten(1).mean(1) > 1e4 * (1 - states["t"]) / 2
    assert 1 - from_data.float().mean() == pytest.approx(fraction, abs=0.1)


def test_batch_without_trajectory_states_has_no_roll_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batches = meanflow("small", trajectory_fraction=0.5), []
    monkeypatch.setattr(module, "roll_out", lambda noise, *_: batches.append(len(noise)) or noise)
    for seed in range(16):
        torch.manual_seed(seed)
        module.objective(torch.randn(1, 3, 4, 4), empty_captions(1))
    assert set(batches) == {1}
    assert 0 < len(batches) < 16


@pytest.mark.parametrize("source", ["student", "teacher"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_training_on_prompts_corrects_a_biased_student(kind: str, source: str, tmp_path: Any) -> None:
    module = method(kind, trajectory_fraction=1.0, trajectory_source=source)
    with torch.no_grad():
        module.student.bias.add_(1.0)
    run = trainer(tmp_path, max_steps=96, max_epochs=-1)
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.03)
    run.fit(module, datamodule=Captions())
    assert module.student.bias.abs() < 0.2


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_meanflow_with_alignment_trains_on_prompts(source: str, tmp_path: Any) -> None:
    module = meanflow(trajectory_fraction=1.0, trajectory_source=source, alignment=TrajectoryAlignment(weight=0.1))
    with torch.no_grad():
        module.student.bias.add_(1.0)
    run = trainer(tmp_path, max_steps=64, max_epochs=-1)
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.03)
    run.fit(module, datamodule=Captions())
    assert module.student.bias.abs() < 0.2
    assert run.callback_metrics["val/average_velocity_error"] < 0.1


def test_noised_data_without_images_is_an_error(tmp_path: Any) -> None:
    module = MeanFlow(GaussianAdapter("small"), validation=VALIDATION, trajectory_fraction=0.9)
    with pytest.raises(ConfigurationError, match="Captions, which has no images, and MeanFlow trains on them"):
        trainer(tmp_path).fit(module, datamodule=Captions())
    assert not module.networks.built


def test_trajectory_states_with_the_data_bridge_are_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"model.bridge is data.*trajectory_fraction is 0.5"):
        method("IMM", bridge="data", trajectory_fraction=0.5)
