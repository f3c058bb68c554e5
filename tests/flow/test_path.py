import pytest
import torch

from lightning_distill.flow.path import conditional_velocity, expand, flow_step, interpolate, predict_noise, predict_x0, renoise
from tests.gaussian import GaussianTeacher


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    return x0, noise, torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("shape", [(2,), (2, 7), (2, 4, 8, 8)])
def test_expand_broadcasts_over_all_but_the_batch_dimension(shape):
    expanded = expand(torch.tensor([0.25, 0.5]), torch.zeros(shape))
    assert expanded.shape == (2,) + (1,) * (len(shape) - 1)
    assert (expanded * torch.ones(shape)).flatten(0)[0] == 0.25
    assert (expanded * torch.ones(shape)).flatten(0)[-1] == 0.5


def test_path_starts_at_data_and_ends_at_noise(pair):
    x0, noise, t = pair
    x_t = interpolate(x0, noise, t)
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[-1], noise[-1])


def test_conditional_velocity_is_the_derivative_of_the_path(pair):
    x0, noise, _ = pair
    t, eps = torch.full((5,), 0.4, dtype=torch.float64), 1e-3
    slope = (interpolate(x0, noise, t + eps) - interpolate(x0, noise, t - eps)) / (2 * eps)
    torch.testing.assert_close(conditional_velocity(x0, noise), slope)


def test_predict_x0_and_predict_noise_recover_the_ends(pair):
    x0, noise, t = pair
    x_t, v = interpolate(x0, noise, t), conditional_velocity(x0, noise)
    torch.testing.assert_close(predict_x0(x_t, v, t), x0)
    torch.testing.assert_close(predict_noise(x_t, v, t), noise)


def test_flow_step_of_one_pair_stays_on_its_path(pair):
    x0, noise, t = pair
    r = t * 0.3
    x_r = flow_step(interpolate(x0, noise, t), conditional_velocity(x0, noise), r, t)
    torch.testing.assert_close(x_r, interpolate(x0, noise, r))


def test_flow_step_of_bfloat16_states_returns_float32():
    x_t, u = torch.full((1, 1, 1, 1), 1.0, dtype=torch.bfloat16), torch.full((1, 1, 1, 1), 0.01, dtype=torch.bfloat16)
    x_r = flow_step(x_t, u, r=torch.tensor([0.4]), t=torch.tensor([0.5]))
    assert x_r.dtype == torch.float32
    assert x_r.item() == pytest.approx(0.999, abs=1e-5)


@pytest.mark.parametrize(("s", "tau"), [(0.0, 0.3), (0.2, 0.2), (0.3, 0.6), (0.5, 0.51), (0.9, 1.0)])
def test_renoise_preserves_the_marginals(s, tau):
    teacher, size = GaussianTeacher(mean=0.7, std=0.4), 400_000
    x0, noise, fresh = torch.randn(3, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x0 = teacher.mean + teacher.std * x0
    s_rows, tau_rows = torch.full((size,), s, dtype=torch.float64), torch.full((size,), tau, dtype=torch.float64)
    x_tau = renoise(interpolate(x0, noise, s_rows), s_rows, tau_rows, fresh)
    sigma = teacher.sigma(torch.tensor(tau, dtype=torch.float64)).item()
    assert x_tau.mean().item() == pytest.approx((1 - tau) * teacher.mean, abs=5 * sigma / size**0.5)
    assert x_tau.std().item() == pytest.approx(sigma, rel=5 / (2 * size) ** 0.5)


@pytest.mark.parametrize(("s", "tau"), [(0.0, 0.3), (0.2, 0.7), (0.5, 0.501), (0.99, 1.0)])
def test_renoise_has_the_stated_coefficients(s, tau):
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    s_row, tau_row = torch.tensor([s], dtype=torch.float64), torch.tensor([tau], dtype=torch.float64)
    a = renoise(one, s_row, tau_row, zero).item()
    b = renoise(zero, s_row, tau_row, one).item()
    assert a == pytest.approx((1 - tau) / (1 - s))
    assert b**2 == pytest.approx(tau**2 - a**2 * s**2, rel=1e-9)


def test_renoise_to_the_same_time_is_the_identity_in_float32():
    s = torch.linspace(0, 0.99, 100)
    x_s = torch.randn(100, 3, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(renoise(x_s, s, s, torch.full_like(x_s, 100.0)), x_s, rtol=1e-6, atol=0.0)
