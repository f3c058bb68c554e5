from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_distill.flow.distribution_matching import (
    DIVERGENCES,
    critic_loss,
    diffuse,
    diffusion_std,
    divergence_weight,
    matching_gradient,
    matching_loss,
)
from lightning_distill.flow.path import interpolate


def test_matching_loss_has_the_matching_gradient() -> None:
    x_s = torch.randn(4, 3, requires_grad=True)
    gradient = matching_gradient(x_s.detach(), torch.randn(4, 3), torch.randn(4, 3))
    (found,) = torch.autograd.grad(matching_loss(x_s, gradient).sum(), x_s)
    torch.testing.assert_close(found, gradient / 3)  # the loss is a mean over entries


def test_matching_gradient_is_scale_invariant() -> None:
    x, critic, teacher = torch.randn(3, 4, 8)
    torch.testing.assert_close(matching_gradient(x, critic, teacher), matching_gradient(5 * x, 5 * critic, 5 * teacher))


def test_critic_loss_at_s_0_is_flow_matching() -> None:
    x0, s = torch.randn(16, 3), torch.zeros(16)
    diffused = diffuse(x0, s, torch.rand(16))
    torch.testing.assert_close(diffused.x_tau, interpolate(x0, diffused.noise, diffused.tau))
    torch.testing.assert_close(diffusion_std(s, diffused.tau), diffused.tau)
    v = torch.randn(16, 3)
    plain = (v - (diffused.noise - x0)).square().mean(1)
    torch.testing.assert_close(critic_loss(v, x0, s, diffused), plain, rtol=1e-3, atol=1e-3)


GENERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda r: -r.log(),
    "softened_reverse_kl": lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * (0.5 + 0.5 * r).log(),
    "squared_hellinger": lambda r: 1 - r.sqrt(),
    "forward_kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
}


def test_all_divergences_have_a_test_generator() -> None:
    assert set(GENERATORS) == set(DIVERGENCES)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_weighted_score_difference_is_the_gradient_of_the_divergence(name) -> None:
    """Two normal distributions; the student's parameter shifts its own. Both sides are on a fine grid in float64."""
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)

    def log_density(x: Tensor, mean: Tensor | float, std: float) -> Tensor:
        return -0.5 * ((x - mean) / std).square() - torch.tensor(std * (2 * torch.pi) ** 0.5).log()

    shift = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    log_p, log_q = log_density(z, -0.3, 1.3), log_density(z, shift, 1.1)
    divergence = torch.trapezoid(log_q.exp() * GENERATORS[name]((log_p - log_q).exp()), z)
    (expected,) = torch.autograd.grad(divergence, shift)
    with torch.no_grad():
        difference = -(z + 0.3) / 1.3**2 + (z - shift) / 1.1**2  # of the scores
        weighted = divergence_weight((log_p - log_q).exp(), name) * difference  # samples move by the same amount as the shift
        found = -torch.trapezoid(log_q.exp() * weighted, z)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
