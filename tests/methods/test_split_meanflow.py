from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import expand, interpolate
from lightning_distill.methods import SplitMeanFlow
from lightning_distill.methods.networks import GuidedCondition
from tests.methods.gaussian_adapter import GAUSSIAN, GaussianAdapter
from tests.methods.test_meanflow import VALIDATION, loader, trainer


def method(student: str = "exact", **settings: Any) -> SplitMeanFlow:
    module = SplitMeanFlow(GaussianAdapter(student), validation=VALIDATION, **settings)
    module.setup("fit")
    module.configure_model()
    return module


@pytest.fixture
def points() -> tuple[Tensor, Tensor, Tensor, GuidedCondition]:
    t = torch.linspace(0.2, 1.0, 16)
    x_t = interpolate(GAUSSIAN.mean + GAUSSIAN.std * torch.randn(16, 3, 4, 4), torch.randn(16, 3, 4, 4), t)
    condition = {"caption": torch.zeros(16)}
    return x_t, 0.3 * t, t, GuidedCondition(condition, condition, torch.ones(16))


def test_the_target_is_the_exact_average_velocity_for_an_exact_student(points) -> None:
    x_t, r, t, condition = points
    target = method().split_target(x_t, r, t, torch.rand(16), condition)
    torch.testing.assert_close(target, GAUSSIAN.average_velocity(x_t, r, t), rtol=1e-4, atol=1e-4)


def test_the_target_is_the_mean_of_two_jumps(points) -> None:
    x_t, r, t, condition = points
    module = method("small")
    s = 0.6 * t
    target = module.split_target(x_t, r, t, (t - s) / (t - r), condition)
    x_s = module.student_step(x_t, s, t, condition)
    x_r = module.student_step(x_s, r, s, condition)
    torch.testing.assert_close(x_t - expand(t - r, x_t) * target, x_r)
    assert not target.requires_grad


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_an_interval_that_is_not_split_is_the_students_own(share, points) -> None:
    x_t, r, t, condition = points
    module = method("small")
    target = module.split_target(x_t, r, t, torch.full((16,), share), condition)
    torch.testing.assert_close(target, module.average_velocity(x_t, r, t, condition).detach())


def test_the_teacher_is_asked_where_r_is_t_alone(points, monkeypatch) -> None:
    x_t, r, t, condition = points
    module = method("small")
    equal = torch.arange(16) % 4 == 0
    r = torch.where(equal, t, r)
    asked = []
    teacher = module.teacher_velocity
    monkeypatch.setattr(module, "teacher_velocity", lambda x, t, condition: asked.append(t) or teacher(x, t, condition))
    target = module.split_target(x_t, r, t, torch.rand(16), condition)
    assert torch.equal(torch.cat(asked), t[equal])
    torch.testing.assert_close(target[equal], GAUSSIAN.velocity(x_t, t)[equal])
    assert torch.isfinite(target).all()


def test_an_exact_student_feels_nothing(monkeypatch) -> None:
    monkeypatch.setattr(SplitMeanFlow, "global_step", 0)
    x0, gradients = GAUSSIAN.mean + GAUSSIAN.std * torch.randn(256, 3, 4, 4), []
    for bias in (0.0, 0.5):
        module = method()
        module.student.bias.data += bias
        module.objective(x0, {"caption": torch.zeros(256)}).loss.mean().backward()
        gradients.append(module.student.bias.grad.abs().item())
    assert gradients[0] < 1e-4 * gradients[1]


def test_training_reduces_the_error(tmp_path) -> None:
    module = method("small", optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    (before,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    trainer(tmp_path, max_steps=160, max_epochs=-1, limit_val_batches=0).fit(module, loader())
    (after,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    assert after["val/average_velocity_error"] < 0.5 * before["val/average_velocity_error"]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_share_that_leaves_the_teacher_or_the_jumps_out_is_refused(fraction) -> None:
    with pytest.raises(ConfigurationError, match=r"model\.equal_fraction"):
        SplitMeanFlow(GaussianAdapter(), validation=VALIDATION, equal_fraction=fraction)
