from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.losses import PowerLoss
from lightning_distill.flow.path import expand, interpolate
from lightning_distill.methods import ConsistencyDistillation, Guidance, MeanFlow
from lightning_distill.methods.networks import GuidedCondition
from tests.methods.gaussian_adapter import GAUSSIAN, GaussianAdapter
from tests.methods.test_meanflow import VALIDATION, loader, trainer


def method(student: str = "exact", **settings: Any) -> ConsistencyDistillation:
    module = ConsistencyDistillation(GaussianAdapter(student), validation=VALIDATION, **settings)
    module.setup("fit")
    module.configure_model()
    return module


@pytest.fixture
def points() -> tuple[Tensor, Tensor, GuidedCondition]:
    t = torch.linspace(0.01, 1.0, 16)
    x_t = interpolate(GAUSSIAN.mean + GAUSSIAN.std * torch.randn(16, 3, 4, 4), torch.randn(16, 3, 4, 4), t)
    condition = {"caption": torch.zeros(16)}
    return x_t, t, GuidedCondition(condition, condition, torch.ones(16))


def test_an_exact_student_is_consistent(points) -> None:
    x_t, t, condition = points
    f, target = method(teacher_step=0.05).consistency(x_t, t, condition)
    torch.testing.assert_close(f, GAUSSIAN.flow_map(x_t, t, torch.zeros_like(t)), rtol=1e-5, atol=1e-5)
    assert (f - target).norm() / f.norm() < 1e-3
    assert f.requires_grad
    assert not target.requires_grad


def test_an_exact_student_has_no_gradient(points) -> None:
    x_t, t, condition = points
    gradients = []
    for bias in (0.0, 0.5):
        module = method(teacher_step=0.05, loss=PowerLoss())
        module.student.bias.data += bias
        module.loss(*module.consistency(x_t, t, condition)).mean().backward()
        gradients.append(module.student.bias.grad.abs().item())
    assert gradients[0] < 0.02 * gradients[1]


def test_it_is_bootstrapped_meanflow_to_data_times_t_squared(points) -> None:
    x_t, t, condition = points
    module = method("small", teacher_step=0.1, loss=PowerLoss())
    meanflow = MeanFlow(
        GaussianAdapter("small"), validation=VALIDATION, solution="bootstrapped", solver="heun", bootstrap_step=0.1
    )
    meanflow.setup("fit")
    meanflow.configure_model()
    meanflow.student.load_state_dict(module.student.state_dict())
    u, target, _ = meanflow.regression(x_t, torch.zeros_like(t), t, condition)
    (expand(t, u) * (u - target)).square().flatten(1).mean(1).sum().backward()
    module.loss(*module.consistency(x_t, t, condition)).sum().backward()
    for ours, theirs in zip(module.student.parameters(), meanflow.student.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_the_target_may_be_the_averages(points) -> None:
    x_t, t, condition = points
    online, average = (method("small", target=target, ema_decay=0.5) for target in ("online", "ema"))
    average.load_state_dict(online.state_dict(), strict=False)
    for module in (online, average):
        module.ema.module.layers[-1].bias.data += 1.0  # u is larger by 1, so f is smaller by r
    (f, own), (same, other) = (module.consistency(x_t, t, condition) for module in (online, average))
    torch.testing.assert_close(f, same)
    r = (t - 0.02).clamp_min(0)
    torch.testing.assert_close(own - other, expand(r, own).expand_as(own))
    assert average.ema.module.training


@pytest.mark.parametrize(("step", "r"), [(0.1, 0.4), (0.6, 0.0)])
def test_the_teachers_step_is_measured_on_the_grid(step, r, points, monkeypatch) -> None:
    x_t, _, condition = points
    module = method(teacher_step=step)
    asked = []
    monkeypatch.setattr(module, "integrate_teacher", lambda x, r, t, *_: asked.append(r) or x)
    module.consistency(x_t, torch.full((16,), 0.5), condition)
    monkeypatch.setattr(module.adapter, "time_shift", lambda shape: 3.0)
    module.consistency(x_t, torch.full((16,), 0.5), condition)
    even = 0.25 - step  # a shift of 3 moves 0.25 to 0.5
    shifted = 3 * even / (1 + 2 * even) if even > 0 else 0.0
    assert [place[0].item() for place in asked] == pytest.approx([r, shifted])


def test_training_reduces_the_error(tmp_path) -> None:
    module = method("small", teacher_step=0.2, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    (before,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    trainer(tmp_path, max_steps=160, max_epochs=-1, limit_val_batches=0).fit(module, loader())
    (after,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    assert after["val/average_velocity_error"] < 0.5 * before["val/average_velocity_error"]


def test_it_samples_by_jumps_to_data() -> None:
    module = method()
    assert module.adapter.stochastic_sampling
    assert [interval for interval in module.measured_intervals if interval[0] > 0] == []
    asked = []
    module.student.register_forward_pre_hook(lambda network, args: asked.append(args[1]))
    pictures = module.sample([""] * 256, nfe=3, batch_size=256)
    assert len(asked) == 3
    assert all((r == 0).all() for r in asked)
    # Pictures are data / 2 + 0.5, cut off at 1.
    expected = (GAUSSIAN.mean + GAUSSIAN.std * torch.randn(100_000)) / 2 + 0.5
    assert pictures.mean() == pytest.approx(expected.clamp(0, 1).mean().item(), abs=0.01)
    assert pictures.std() == pytest.approx(expected.clamp(0, 1).std().item(), abs=0.01)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"solver": "rk4"}, r"model\.solver"),
        ({"teacher_step": 0.0}, r"model\.teacher_step"),
        ({"teacher_step": 1.5}, r"model\.teacher_step"),
        ({"target": "teacher"}, r"model\.target"),
        ({"target": "ema"}, r"model\.ema_decay is null"),
        ({"guidance": Guidance("improved"), "caption_dropout": 0.1}, r"guidance\.kind improved .* ConsistencyDistillation"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, names) -> None:
    with pytest.raises(ConfigurationError, match=names):
        ConsistencyDistillation(GaussianAdapter(), validation=VALIDATION, **settings)
