import math

import pytest
import torch
from torch import Tensor

from lightning_distill.flow import (
    consistency_tangent,
    expand,
    interpolate,
    linear_state,
    linear_time,
    linear_velocity,
    time_derivative,
    trig_state,
    trig_time,
    trig_velocity,
)
from tests.gaussian import GaussianTeacher

GAUSSIAN = GaussianTeacher()


@pytest.fixture
def points() -> tuple[Tensor, Tensor, Tensor]:
    """x0, noise and t; t includes both ends of the path."""
    return torch.randn(9, 3, 4).double(), torch.randn(9, 3, 4).double(), torch.linspace(0, 1, 9).double()


def test_trig_state_matches_its_definition(points) -> None:
    x0, noise, t = points
    s = trig_time(t)
    expected = expand(s.cos(), x0) * x0 + expand(s.sin(), x0) * noise
    torch.testing.assert_close(trig_state(interpolate(x0, noise, t), s), expected)
    assert s[0] == 0
    assert s[-1] == pytest.approx(math.pi / 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_conversions_are_invertible(dtype, tolerance, points) -> None:
    x_t, v, t = (value.to(dtype) for value in points)
    s = trig_time(t)
    assert (linear_time(s) - t).abs().max() < tolerance
    assert (linear_state(trig_state(x_t, s), s) - x_t).norm() / x_t.norm() < tolerance
    assert (linear_velocity(trig_velocity(v, x_t, s), x_t, s) - v).norm() / v.norm() < tolerance


def test_trig_velocity_is_the_derivative_of_trig_state(points) -> None:
    """The states follow one trajectory of the linear flow."""
    x0, noise, t = points
    x_t, s, step = interpolate(x0, noise, t), trig_time(t), 1e-4

    def state(s: Tensor) -> Tensor:
        later = linear_time(s)
        return trig_state(GAUSSIAN.flow_map(x_t, t, later), s)

    difference = (state(s + step) - state(s - step)) / (2 * step)
    velocity = trig_velocity(GAUSSIAN.velocity(x_t, t), x_t, s)
    torch.testing.assert_close(velocity, difference, rtol=1e-6, atol=1e-6)


def test_x0_prediction_is_the_flow_step_to_0(points) -> None:
    x0, noise, t = points
    x_t, u, s = interpolate(x0, noise, t), torch.randn(9, 3, 4).double(), trig_time(t)
    y_s, f = trig_state(x_t, s), trig_velocity(u, x_t, s)
    torch.testing.assert_close(expand(s.cos(), y_s) * y_s - expand(s.sin(), y_s) * f, x_t - expand(t, x_t) * u)


def test_tangent_is_zero_for_the_exact_consistency_model_only(points) -> None:
    x0, noise, t = points
    s = trig_time(t)
    y_s = trig_state(interpolate(x0, noise, t), s)

    def network(y: Tensor, r: Tensor, s: Tensor, off: float = 0.0) -> Tensor:
        x = linear_state(y, s)
        return trig_velocity(GAUSSIAN.average_velocity(x, r, linear_time(s)) + off * x.square(), x, s)

    velocity = trig_velocity(GAUSSIAN.velocity(linear_state(y_s, s), t), linear_state(y_s, s), s)
    zero = torch.zeros_like(s)
    g = consistency_tangent(*reordered(*time_derivative(network, y_s, zero, s, velocity), velocity, y_s), s)
    assert g.abs().max() < 1e-12
    wrong = time_derivative(lambda y, r, s: network(y, r, s, 0.1), y_s, zero, s, velocity)
    assert consistency_tangent(*reordered(*wrong, velocity, y_s), s).abs().max() > 1e-2


def test_tangent_equals_the_meanflow_residual_at_r_0(points) -> None:
    """`g = -cos s (dt/ds) (u - u*)`, with MeanFlow's target `u* = v - t du/dt`.

    Here `dt/ds = 1 / (cos s + sin s)^2`.
    """
    x0, noise, t = points
    x_t, s, zero = interpolate(x0, noise, t), trig_time(t), torch.zeros_like(t)
    v = GAUSSIAN.velocity(x_t, t)

    def u(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x) * expand(t + r, x).cos()

    def network(y: Tensor, r: Tensor, s: Tensor) -> Tensor:
        x = linear_state(y, s)
        return trig_velocity(u(x, r, linear_time(s)), x, s)

    value, dudt = time_derivative(u, x_t, zero, t, v)
    residual = value - (v - expand(t, v) * dudt)
    y_s, velocity = trig_state(x_t, s), trig_velocity(v, x_t, s)
    g = consistency_tangent(*reordered(*time_derivative(network, y_s, zero, s, velocity), velocity, y_s), s)
    torch.testing.assert_close(g, -expand(s.cos() / (s.cos() + s.sin()) ** 2, v) * residual)


def test_warm_up_weight_0_leaves_the_teacher_term(points) -> None:
    f, velocity, s = *points[:2], trig_time(points[2])
    y_s, dfds = torch.randn_like(f), torch.randn_like(f)
    g = consistency_tangent(f, velocity, y_s, dfds, s, weight=0.0)
    torch.testing.assert_close(g, expand(s.cos() ** 2, f) * (velocity - f))


def reordered(f: Tensor, dfds: Tensor, velocity: Tensor, y_s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return f, velocity, y_s, dfds
