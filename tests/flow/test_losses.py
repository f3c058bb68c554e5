import pytest
import torch

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.losses import PseudoHuberLoss, adaptive_loss, power_loss, pseudo_huber_loss


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    u, target = torch.randn(2, 6, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return u.requires_grad_(), target


def mean_squared_error(u: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((u - target) ** 2).mean((1, 2, 3))


def test_power_loss_matches_hand_calculation():
    u, target = torch.tensor([[3.0, 1.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    # squared norms: (4 + 0) / 2 and (0 + 1) / 2
    torch.testing.assert_close(power_loss(u, target, gamma=1.0), torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(power_loss(u, target, gamma=2.0), torch.tensor([4.0, 0.25]))
    torch.testing.assert_close(power_loss(u, target, gamma=1.5), torch.tensor([2.0**1.5, 0.5**1.5]))


def test_adaptive_loss_matches_hand_calculation():
    u, target = torch.tensor([[3.0, 1.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    torch.testing.assert_close(adaptive_loss(u, target, p=1.0, c=0.5), torch.tensor([2 / 2.5, 0.5 / 1.0]))
    torch.testing.assert_close(adaptive_loss(u, target, p=0.5, c=2.0), torch.tensor([2 / 2.0, 0.5 / 2.5**0.5]))
    torch.testing.assert_close(adaptive_loss(u, target, p=1.0), torch.tensor([2 / 2.001, 0.5 / 0.501]))


def test_pseudo_huber_loss_matches_hand_calculation():
    u, target = torch.tensor([[3.0, 1.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    torch.testing.assert_close(pseudo_huber_loss(u, target, c=0.5), torch.tensor([2.25**0.5 - 0.5, 0.75**0.5 - 0.5]))


def test_pseudo_huber_loss_is_quadratic_below_c_and_linear_above(pair):
    u, target = pair
    squared = mean_squared_error(u, target)
    torch.testing.assert_close(pseudo_huber_loss(u, target, c=1e4), squared / 2e4, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(pseudo_huber_loss(u, target, c=1e-4), squared.sqrt() - 1e-4, rtol=1e-6, atol=1e-9)


def test_pseudo_huber_loss_with_invalid_threshold_raises(pair):
    with pytest.raises(ConfigurationError, match="c of the pseudo-Huber loss is 0"):
        pseudo_huber_loss(*pair, c=0.0)
    with pytest.raises(ConfigurationError, match=r"loss\.c is -1"):
        PseudoHuberLoss(c=-1.0)


def test_power_1_and_adaptive_0_equal_the_mean_squared_error(pair):
    torch.testing.assert_close(power_loss(*pair, gamma=1.0), mean_squared_error(*pair))
    torch.testing.assert_close(adaptive_loss(*pair, p=0.0), mean_squared_error(*pair))


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_adaptive_weight_has_no_gradient(pair, p):
    u, target = pair
    adaptive_loss(u, target, p, c=0.1).sum().backward()
    weight = 1 / (mean_squared_error(u, target).detach() + 0.1) ** p
    torch.testing.assert_close(u.grad, weight[:, None, None, None] * 2 * (u.detach() - target) / target[0].numel())


def test_power_and_adaptive_gradients_agree_up_to_the_factor_gamma(pair):
    u, target = pair
    (power,) = torch.autograd.grad(power_loss(u, target, gamma=1.5).sum(), u)
    (adaptive,) = torch.autograd.grad(adaptive_loss(u, target, p=1 - 1.5, c=1e-12).sum(), u)
    torch.testing.assert_close(power, 1.5 * adaptive)


@pytest.mark.parametrize(
    "loss",
    [
        lambda u, v: power_loss(u, v, 1.0),
        lambda u, v: power_loss(u, v, 2.0),
        lambda u, v: adaptive_loss(u, v, 1.0),
        pseudo_huber_loss,
    ],
)
def test_zero_error_has_zero_loss_and_gradient(loss):
    u = torch.ones(2, 3, requires_grad=True)
    value = loss(u, torch.ones(2, 3))
    value.sum().backward()
    assert torch.equal(value, torch.zeros(2))
    assert torch.equal(u.grad, torch.zeros(2, 3))


def test_losses_do_not_depend_on_the_latent_size(pair):
    u, target = pair
    larger = [part.repeat(1, 1, 3, 2) for part in pair]
    torch.testing.assert_close(power_loss(u, target, 2.0), power_loss(*larger, 2.0))
    torch.testing.assert_close(adaptive_loss(u, target, 1.0), adaptive_loss(*larger, 1.0))


def test_settings_with_undefined_gradients_raise(pair):
    with pytest.raises(ConfigurationError, match=r"gamma is 0\.5; .* p = 1 - gamma"):
        power_loss(*pair, gamma=0.5)
    with pytest.raises(ConfigurationError, match="c of the adaptive loss"):
        adaptive_loss(*pair, p=1.0, c=0.0)
