import torch

from lightning_distill.flow.distribution_matching import critic_loss, diffuse, diffusion_std, matching_gradient, matching_loss
from lightning_distill.flow.path import interpolate


def test_states_are_diffused_within_their_segment() -> None:
    s, end = torch.linspace(0, 0.7, 64), torch.linspace(0.2, 1.0, 64)
    tau = diffuse(torch.randn(64, 3), s, end).tau
    assert (tau > s).all()
    assert (tau < end).all()
    assert (diffuse(torch.randn(64, 3), s).tau > end).any()


def test_the_gradient_of_the_loss_is_the_matching_gradient() -> None:
    x_s = torch.randn(4, 3, requires_grad=True)
    gradient = matching_gradient(x_s.detach(), torch.randn(4, 3), torch.randn(4, 3))
    (found,) = torch.autograd.grad(matching_loss(x_s, gradient).sum(), x_s)
    torch.testing.assert_close(found, gradient / 3)  # a mean over entries


def test_the_gradient_does_not_depend_on_the_scale_of_the_latents() -> None:
    x, critic, teacher = torch.randn(3, 4, 8)
    torch.testing.assert_close(matching_gradient(x, critic, teacher), matching_gradient(5 * x, 5 * critic, 5 * teacher))


def test_at_data_the_critic_learns_by_flow_matching() -> None:
    x0, s = torch.randn(16, 3), torch.zeros(16)
    diffused = diffuse(x0, s)
    torch.testing.assert_close(diffused.x_tau, interpolate(x0, diffused.noise, diffused.tau))
    torch.testing.assert_close(diffusion_std(s, diffused.tau), diffused.tau)
    v = torch.randn(16, 3)
    plain = (v - (diffused.noise - x0)).square().mean(1)
    torch.testing.assert_close(critic_loss(v, x0, s, diffused), plain, rtol=1e-3, atol=1e-3)
