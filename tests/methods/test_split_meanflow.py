from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import expand
from lightning_distill.methods import SplitMeanFlow
from lightning_distill.methods.networks import GuidedCondition
from tests.methods.gaussian_adapter import GAUSSIAN, GaussianAdapter
from tests.methods.gaussian_runs import (
    VALIDATION,
    build,
    data_samples,
    empty_captions,
    loader,
    path_states,
    trainer,
    unguided,
)

Points = tuple[Tensor, Tensor, Tensor, GuidedCondition]


def method(student: str = "exact", **settings: Any) -> Any:
    return build(SplitMeanFlow(GaussianAdapter(student), validation=VALIDATION, **settings))


@pytest.fixture
def points() -> Points:
    """States x_t, ends r, starts t and conditions."""
    x_t, t = path_states()
    return x_t, 0.3 * t, t, unguided(16)


def test_target_of_exact_student_is_exact_average_velocity(points: Points) -> None:
    x_t, r, t, condition = points
    target = method().split_target(x_t, r, t, torch.rand(16), condition)
    torch.testing.assert_close(target, GAUSSIAN.average_velocity(x_t, r, t), rtol=1e-4, atol=1e-4)


def test_step_by_the_target_equals_two_student_steps(points: Points) -> None:
    x_t, r, t, condition = points
    module = method("small")
    s = 0.6 * t
    target = module.split_target(x_t, r, t, (t - s) / (t - r), condition)
    x_s = module.networks.student_step(x_t, s, t, condition)
    x_r = module.networks.student_step(x_s, r, s, condition)
    torch.testing.assert_close(x_t - expand(t - r, x_t) * target, x_r)
    assert not target.requires_grad


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_target_of_a_split_at_an_end_is_the_average_velocity_of_the_student(share: float, points: Points) -> None:
    x_t, r, t, condition = points
    module = method("small")
    target = module.split_target(x_t, r, t, torch.full((16,), share), condition)
    torch.testing.assert_close(target, module.networks.average_velocity(x_t, r, t, condition).detach())


def test_teacher_evaluates_only_rows_with_r_equal_t(points: Points, monkeypatch: pytest.MonkeyPatch) -> None:
    x_t, r, t, condition = points
    module = method("small")
    equal = torch.arange(16) % 4 == 0
    r = torch.where(equal, t, r)
    times, velocity = [], module.networks.teacher_velocity
    monkeypatch.setattr(
        module.networks, "teacher_velocity", lambda x, t, condition: times.append(t) or velocity(x, t, condition)
    )
    target = module.split_target(x_t, r, t, torch.rand(16), condition)
    assert torch.equal(torch.cat(times), t[equal])
    torch.testing.assert_close(target[equal], GAUSSIAN.velocity(x_t, t)[equal])
    assert torch.isfinite(target).all()


def test_exact_student_has_almost_no_gradient() -> None:
    x0, gradients = data_samples(256), []
    for bias in (0.0, 0.5):
        module = method()
        module.student.bias.data += bias
        module.objective(x0, empty_captions(256)).loss.mean().backward()
        gradients.append(module.student.bias.grad.abs().item())
    assert gradients[0] < 1e-4 * gradients[1]


def test_training_halves_the_average_velocity_error(tmp_path: Any) -> None:
    module = method("small", optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    (before,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    trainer(tmp_path, max_steps=160, max_epochs=-1, limit_val_batches=0).fit(module, loader())
    (after,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    assert after["val/average_velocity_error"] < 0.5 * before["val/average_velocity_error"]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_equal_fraction_outside_of_0_to_1_is_an_error(fraction: float) -> None:
    with pytest.raises(ConfigurationError, match=r"model\.equal_fraction"):
        SplitMeanFlow(GaussianAdapter(), validation=VALIDATION, equal_fraction=fraction)
