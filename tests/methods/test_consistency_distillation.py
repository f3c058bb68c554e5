from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.losses import PowerLoss
from lightning_distill.flow.path import expand
from lightning_distill.methods import ConsistencyDistillation, Guidance
from lightning_distill.methods.networks import GuidedCondition
from tests.methods.gaussian_adapter import GAUSSIAN, GaussianAdapter
from tests.methods.gaussian_runs import VALIDATION, build, loader, meanflow, path_states, trainer, unguided

Points = tuple[Tensor, Tensor, GuidedCondition]


def method(student: str = "exact", **settings: Any) -> Any:
    return build(ConsistencyDistillation(GaussianAdapter(student), validation=VALIDATION, **settings))


@pytest.fixture
def points() -> Points:
    """States x_t, times t and conditions."""
    return *path_states(0.01), unguided(16)


def test_exact_student_is_consistent(points: Points) -> None:
    x_t, t, condition = points
    f, target = method(teacher_step=0.05).consistency(x_t, t, condition)
    torch.testing.assert_close(f, GAUSSIAN.flow_map(x_t, t, torch.zeros_like(t)), rtol=1e-5, atol=1e-5)
    assert (f - target).norm() / f.norm() < 1e-3
    assert f.requires_grad
    assert not target.requires_grad


def test_exact_student_has_almost_no_gradient(points: Points) -> None:
    gradients = []
    for bias in (0.0, 0.5):
        module = method(teacher_step=0.05, loss=PowerLoss())
        module.student.bias.data += bias
        module.loss(*module.consistency(*points)).mean().backward()
        gradients.append(module.student.bias.grad.abs().item())
    assert gradients[0] < 0.02 * gradients[1]


def test_gradient_is_that_of_bootstrapped_meanflow_at_r_0_times_t_squared(points: Points) -> None:
    x_t, t, condition = points
    module = method("small", teacher_step=0.1, loss=PowerLoss())
    bootstrapped = meanflow("small", solution="bootstrapped", solver="heun", bootstrap_step=0.1)
    bootstrapped.student.load_state_dict(module.student.state_dict())
    u, target, _ = bootstrapped.regression(x_t, torch.zeros_like(t), t, condition)
    (expand(t, u) * (u - target)).square().flatten(1).mean(1).sum().backward()
    module.loss(*module.consistency(x_t, t, condition)).sum().backward()
    for parameter, other in zip(module.student.parameters(), bootstrapped.student.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-6)


def test_target_network_is_the_student_or_its_ema(points: Points) -> None:
    x_t, t, condition = points
    online, ema = (method("small", target=target, ema_decay=0.5) for target in ("online", "ema"))
    ema.load_state_dict(online.state_dict(), strict=False)
    for module in (online, ema):
        module.ema.module.layers[-1].bias.data += 1.0  # u of the EMA is larger by 1, so its f is smaller by r
    (f, online_target), (same, ema_target) = (module.consistency(x_t, t, condition) for module in (online, ema))
    torch.testing.assert_close(f, same)
    r = (t - 0.02).clamp_min(0)
    torch.testing.assert_close(online_target - ema_target, expand(r, f).expand_as(f))
    assert ema.ema.module.training


@pytest.mark.parametrize(("step", "r"), [(0.1, 0.4), (0.6, 0.0)])
def test_teacher_step_is_measured_on_the_sampling_grid(
    step: float, r: float, points: Points, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_t, _, condition = points
    module, ends = method(teacher_step=step), []
    monkeypatch.setattr(module.networks, "integrate_teacher", lambda x, r, t, *_: ends.append(r) or x)
    module.consistency(x_t, torch.full((16,), 0.5), condition)
    monkeypatch.setattr(module.adapter, "time_shift", lambda shape: 3.0)
    module.consistency(x_t, torch.full((16,), 0.5), condition)
    even = 0.25 - step  # a shift of 3 moves 0.25 to 0.5
    shifted = 3 * even / (1 + 2 * even) if even > 0 else 0.0
    assert [end[0].item() for end in ends] == pytest.approx([r, shifted])


def test_training_halves_the_average_velocity_error(tmp_path: Any) -> None:
    module = method("small", teacher_step=0.2, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    (before,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    trainer(tmp_path, max_steps=160, max_epochs=-1, limit_val_batches=0).fit(module, loader())
    (after,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    assert after["val/average_velocity_error"] < 0.5 * before["val/average_velocity_error"]


def test_sampling_evaluates_the_student_at_r_0_only() -> None:
    module, ends = method(), []
    assert module.adapter.stochastic_sampling
    assert [interval for interval in module.evaluator.measured_intervals if interval[0] > 0] == []
    module.student.register_forward_pre_hook(lambda network, args: ends.append(args[1]))
    images = module.sample([""] * 256, nfe=3, batch_size=256)
    assert len(ends) == 3
    assert all((r == 0).all() for r in ends)
    # Images are data / 2 + 0.5, clamped to [0, 1].
    expected = (GAUSSIAN.mean + GAUSSIAN.std * torch.randn(100_000)) / 2 + 0.5
    assert images.mean() == pytest.approx(expected.clamp(0, 1).mean().item(), abs=0.01)
    assert images.std() == pytest.approx(expected.clamp(0, 1).std().item(), abs=0.01)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"solver": "rk4"}, r"model\.solver"),
        ({"teacher_step": 0.0}, r"model\.teacher_step"),
        ({"teacher_step": 1.5}, r"model\.teacher_step"),
        ({"target": "teacher"}, r"model\.target"),
        ({"target": "ema"}, r"model\.ema_decay is null"),
        ({"guidance": Guidance("improved"), "caption_dropout": 0.1}, r"guidance\.kind is improved.* ConsistencyDistillation"),
    ],
)
def test_error_for_invalid_settings_names_the_setting(settings: Any, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        ConsistencyDistillation(GaussianAdapter(), validation=VALIDATION, **settings)
