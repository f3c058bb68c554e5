import itertools
import math

import pytest
import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import flow_step
from lightning_distill.flow.solvers import SOLVERS, VelocityFn, euler_step, evaluations, heun_step, integrate, midpoint_step
from lightning_distill.flow.times import step_grid, substeps
from tests.gaussian import GaussianTeacher

TEACHER = GaussianTeacher(mean=0.7, std=0.4)


@pytest.fixture
def start() -> tuple[Tensor, Tensor, Tensor]:
    x_t = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([1.0, 0.9, 0.6, 0.5], dtype=torch.float64)
    r = torch.tensor([0.0, 0.3, 0.1, 0.4], dtype=torch.float64)
    return x_t, t, r


def observed_orders(velocity: VelocityFn, x_t: Tensor, t: Tensor, r: Tensor, exact: Tensor, solver: str) -> Tensor:
    """Orders (B,) of convergence from 128 to 256 steps; each row has a different interval."""
    coarse, fine = ((integrate(velocity, x_t, t, r, steps, solver) - exact).flatten(1).norm(dim=1) for steps in (128, 256))
    assert (fine < 0.02 * (exact - x_t).flatten(1).norm(dim=1)).all(), "converges to a wrong state"
    return torch.log2(coarse / fine)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solver_has_its_order_on_a_nonlinear_flow(start, solver):
    _, t, r = start
    x_t = torch.linspace(-0.6, 0.6, 4 * 6, dtype=torch.float64).reshape(4, 6)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return x.square() * torch.cos(2 * t)[:, None]

    exact = 1 / (1 / x_t + (torch.sin(2 * t) - torch.sin(2 * r))[:, None] / 2)
    orders = observed_orders(velocity, x_t, t, r, exact, solver)
    assert (orders - SOLVERS[solver].order).abs().max() < 0.05, orders


# The midpoint method gains an order here. The leading term of its error vanishes if sigma'' is proportional to sigma ** -3.
# This holds for sigma_t, the root of a quadratic in t.
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 3)])
def test_solver_converges_to_the_closed_form_gaussian_flow(start, solver, order):
    x_t, t, r = start
    orders = observed_orders(TEACHER.velocity, x_t, t, r, TEACHER.flow_map(x_t, t, r), solver)
    assert (orders - order).abs().max() < 0.05, orders


@pytest.mark.parametrize("step", [euler_step, heun_step, midpoint_step])
def test_steps_are_exact_for_a_constant_velocity(start, step):
    x_t, t, r = start
    constant = torch.full_like(x_t, 1.5)
    torch.testing.assert_close(step(lambda x, t: constant, x_t, t, r), flow_step(x_t, constant, r, t))


@pytest.mark.parametrize("step", [heun_step, midpoint_step])
def test_second_order_steps_are_exact_for_a_velocity_linear_in_time(start, step):
    x_t, t, r = start
    x_r = step(lambda x, t: t.reshape(-1, 1, 1, 1).expand_as(x), x_t, t, r)
    torch.testing.assert_close(x_r, x_t - ((t**2 - r**2) / 2).reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_velocity_evaluations_match_the_count_and_stay_in_the_interval(start, solver, steps):
    x_t, t, r = start
    times: list[Tensor] = []

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        times.append(time)
        return TEACHER.velocity(x, time)

    integrate(velocity, x_t, t, r, steps, solver)
    assert len(times) == evaluations(solver, steps)
    assert all((r <= time).all() and (time <= t).all() for time in times)
    assert torch.equal(times[0], t)


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_with_equal_times_are_unchanged(start, solver):
    x_t, t, r = start
    r = torch.where(torch.tensor([True, False, True, False]), t, r)
    x_r = integrate(TEACHER.velocity, x_t, t, r, 3, solver)
    assert torch.equal(x_r[[0, 2]], x_t[[0, 2]])
    assert not torch.isclose(x_r[[1, 3]], x_t[[1, 3]]).all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_substeps_equal_the_sampling_grid(shift):
    times = substeps(torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 6, shift)
    torch.testing.assert_close(torch.stack(times)[:, 0].float(), step_grid(6, shift))


def test_substeps_stay_in_the_interval_and_include_its_ends():
    t, r = torch.rand(1000).sort(descending=True).values, torch.zeros(1000)
    r[::2] = t[::2]
    times = substeps(t, r, 7, 3.0)
    assert torch.equal(times[0], t)
    assert torch.equal(times[-1], r)
    assert all((a >= b).all() for a, b in itertools.pairwise(times))
    assert all(torch.equal(time[::2], t[::2]) for time in times)


def test_integrate_uses_the_shifted_grid(start):
    x_t, _, _ = start
    one = torch.ones(4, dtype=torch.float64)
    times: list[Tensor] = []
    integrate(lambda x, t: times.append(t) or x, x_t, one, 0 * one, 4, "euler", shift=3.0)
    torch.testing.assert_close(torch.stack(times)[:, 0].float(), step_grid(4, 3.0)[:-1])


def test_one_euler_step_is_a_flow_step(start):
    x_t, t, r = start
    assert torch.equal(integrate(TEACHER.velocity, x_t, t, r, 1), flow_step(x_t, TEACHER.velocity(x_t, t), r, t))


def test_integration_is_reversible(start):
    x_t, t, r = start
    x_r = integrate(TEACHER.velocity, x_t, t, r, 200, "heun")
    torch.testing.assert_close(integrate(TEACHER.velocity, x_r, r, t, 200, "heun"), x_t, rtol=0, atol=1e-3)


def test_integration_from_noise_reaches_the_data_distribution():
    noise = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ones = torch.ones(len(noise), dtype=torch.float64)
    x0 = integrate(TEACHER.velocity, noise, ones, torch.zeros_like(ones), 50, "midpoint")
    assert x0.mean().item() == pytest.approx(TEACHER.mean, abs=0.005)
    assert x0.std().item() == pytest.approx(TEACHER.std, abs=0.005)


def test_integrate_is_differentiable():
    x_t = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    integrate(lambda x, t: x, x_t, one, zero, 4).sum().backward()
    assert x_t.grad is not None
    assert x_t.grad.item() == pytest.approx((1 - 1 / 4) ** 4)
    assert math.exp(-1) == pytest.approx(integrate(lambda x, t: x, x_t, one, zero, 64, "heun").item(), abs=1e-4)


def test_unknown_solver_and_zero_steps_raise(start):
    x_t, t, r = start
    with pytest.raises(ConfigurationError, match="unknown solver 'rk45'; choose one of euler, heun, midpoint"):
        integrate(TEACHER.velocity, x_t, t, r, 1, "rk45")
    with pytest.raises(ConfigurationError, match="steps"):
        evaluations("euler", 0)
