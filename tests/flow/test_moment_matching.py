import pytest
import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.moment_matching import (
    Kernel,
    LaplaceKernel,
    RBFKernel,
    constant_decrement,
    discrepancy,
    time_weight,
)


class NegativeSquaredDistance(Kernel):
    """Kernel that makes the comparison of single particles equal to that of consistency models."""

    def __call__(self, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return -(x[:, :, None] - y[:, None]).square().sum(-1)


def test_constant_decrement_is_constant_in_eta() -> None:
    t = torch.linspace(0.3, 0.9, 32, dtype=torch.float64)
    r = constant_decrement(t, torch.zeros_like(t), 0.1, 160.0)
    torch.testing.assert_close(t / (1 - t) - r / (1 - r), torch.full_like(t, 0.1))


@pytest.mark.parametrize("exponent", [1, 7, 12, 16])
def test_r_is_between_s_and_t_including_t_near_1(exponent: int) -> None:
    t = torch.cat([torch.linspace(0.001, 1, 1000), torch.tensor([160 / 161, 1 - 1e-7])])
    s = 0.5 * t
    r = constant_decrement(t, s, 160 / 2**exponent, 160.0)
    assert (r >= s).all()
    assert (r < t).all()
    beyond = t > 160 / 161
    assert beyond.sum() > 5
    eta = 160 - 160 / 2**exponent
    torch.testing.assert_close(r[beyond], torch.maximum(s[beyond], torch.tensor(eta / (1 + eta))))


@pytest.mark.parametrize(("power", "bias"), [(1.0, 5.0), (2.0, 4.0)])
def test_time_weight_matches_its_definition(power: float, bias: float) -> None:
    t = torch.linspace(0.01, 0.99, 64, dtype=torch.float64, requires_grad=True)
    ratio = 2 * ((1 - t) / t).log()
    (slope,) = torch.autograd.grad(ratio.sum(), t)
    defined = 0.5 * torch.sigmoid(bias - ratio) * -slope * (1 - t) ** power / ((1 - t) ** 2 + t**2)
    torch.testing.assert_close(time_weight(t, power, bias), defined)


def test_time_weight_is_finite_at_both_ends() -> None:
    ends = torch.tensor([0.0, 1.0])
    assert time_weight(ends, 1.0, 5.0).tolist() == [0.0, 1.0]
    assert time_weight(ends, 2.0, 5.0).tolist() == [0.0, 0.0]


def test_kernels_match_hand_calculation() -> None:
    x, y, scale = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.tensor([0.5])
    y[0, 1, :2] = torch.tensor([3.0, 4.0])  # a distance of 5, in units of 4 x 0.5
    found = LaplaceKernel()(x, y, scale)[0]
    torch.testing.assert_close(found, torch.tensor([0.0, -2.5]).exp().expand(2, 2))
    torch.testing.assert_close(RBFKernel()(x, y, scale)[0, 0, 1], torch.tensor(-3.125).exp())


@pytest.mark.parametrize("kernel", [LaplaceKernel(), RBFKernel()])
class TestDiscrepancy:
    def test_is_zero_for_permuted_particles(self, kernel: Kernel) -> None:
        y, scale = torch.randn(3, 4, 8), torch.ones(3)
        assert discrepancy(y, y.flip(1), kernel, scale).abs().max() < 1e-6

    def test_is_positive_for_different_particles(self, kernel: Kernel) -> None:
        y, scale = torch.randn(3, 4, 8), torch.full((3,), 0.2)
        assert discrepancy(y, y + 1, kernel, scale).min() > 1e-3

    def test_gradient_attracts_to_targets_and_repels_within_the_group(self, kernel: Kernel) -> None:
        y = torch.tensor([[[0.0], [0.1]]], requires_grad=True)
        (apart,) = torch.autograd.grad(-discrepancy(y, torch.tensor([[[-1.0], [1.1]]]), kernel, torch.ones(1)).sum(), y)
        assert apart[0, 0] < 0 < apart[0, 1]
        (together,) = torch.autograd.grad(-discrepancy(y, torch.tensor([[[2.0], [2.0]]]), kernel, torch.ones(1)).sum(), y)
        assert together.sum() > 0
        assert together[0, 0] < together[0, 1]

    @pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0])
    def test_gradient_is_finite_for_coinciding_particles(self, kernel: Kernel, scale: float) -> None:
        y = torch.zeros(1, 2, 4, requires_grad=True)
        z = torch.zeros(1, 2, 4)
        z[0, 1] = 1
        discrepancy(y, z, kernel, torch.tensor([scale])).sum().backward()
        assert torch.isfinite(y.grad).all()


def test_single_particle_discrepancy_is_the_squared_distance() -> None:
    y, z = torch.randn(5, 1, 8, requires_grad=True), torch.randn(5, 1, 8)
    found = discrepancy(y, z, NegativeSquaredDistance(), torch.ones(5))
    torch.testing.assert_close(found, 2 * (y - z).square().sum((1, 2)))


def test_kernel_with_epsilon_0_raises() -> None:
    for kind in (LaplaceKernel, RBFKernel):
        with pytest.raises(ConfigurationError, match=r"kernel\.epsilon is 0"):
            kind(epsilon=0.0)
