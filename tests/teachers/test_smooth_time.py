import math

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from lightning_distill.students.two_time import Float32TimestepEmbedding, SmoothTimeProjection
from lightning_distill.teachers.smooth_time import SmoothTimeReport, largest_derivative, refit_embedder

BOUND = 2 * math.pi
WIDTH = 64


class FluxTime(nn.Module):
    """A FLUX timestep embedder with random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embedder = TimestepEmbedding(256, WIDTH)

    def forward(self, t: Tensor) -> Tensor:
        return self.embedder(self.projection(t * 1000))


class TrainedTime(nn.Module):
    """A model of a trained embedder: a smooth curve with a small amount of FLUX's fast sinusoids."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.slow, self.fast = torch.randn(4, WIDTH), 0.004 * torch.randn(256, WIDTH)

    def forward(self, t: Tensor) -> Tensor:
        curve = torch.stack([t, t**2, (2 * t).sin(), (3 * t).cos()], dim=-1)
        return curve @ self.slow + self.projection(t * 1000) @ self.fast


class SmoothTime(nn.Module):
    """The smooth embedder that replaces them."""

    def __init__(self, bound: float = BOUND) -> None:
        super().__init__()
        self.projection = SmoothTimeProjection(bound)
        self.embedder = Float32TimestepEmbedding(256, WIDTH)

    def features(self, t: Tensor) -> Tensor:
        return self.projection(t)

    def forward(self, t: Tensor) -> Tensor:
        return self.embedder(self.features(t))

    def refit(self, original: nn.Module, derivative_penalty: float = 3e-4) -> SmoothTimeReport:
        return refit_embedder(original, self.features, self.embedder, derivative_penalty=derivative_penalty)


def exact_derivative(network: nn.Module, times: Tensor) -> Tensor:
    """|de/dt| (N,) by forward-mode differentiation."""
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(times, torch.ones_like(times))
        return torch.autograd.forward_ad.unpack_dual(network(dual)).tangent.norm(dim=-1)


def test_refit_approximates_a_trained_embedder_and_reduces_its_derivative() -> None:
    original, smooth = TrainedTime(), SmoothTime()
    report = smooth.refit(original)
    assert report.fit_error < 0.05
    assert report.derivative_after < 0.5 * report.derivative_before

    between = torch.rand(500)
    with torch.no_grad():
        fitted, target = smooth(between), original(between)
    error = (fitted - target).norm() / (target - target.mean(0)).norm()
    assert error == pytest.approx(report.fit_error, rel=0.2)


def test_reported_derivatives_are_exact() -> None:
    original, smooth = FluxTime(), SmoothTime()
    report = smooth.refit(original)
    times = torch.linspace(0, 1, 4001)[1:-1]
    # Central differences slightly underestimate the derivative of sinusoids of 1000 rad.
    assert report.derivative_before == pytest.approx(exact_derivative(original, times).max().item(), rel=0.02)
    assert report.derivative_after == pytest.approx(exact_derivative(smooth, times).max().item(), rel=0.02)


def test_refit_reduces_the_derivative_of_a_random_flux_embedder() -> None:
    report = SmoothTime().refit(FluxTime())
    assert report.derivative_after < 0.2 * report.derivative_before


def test_larger_penalty_gives_smaller_derivative_and_larger_fit_error() -> None:
    original = TrainedTime()
    loose, tight = (SmoothTime().refit(original, penalty) for penalty in (1e-6, 1e-1))
    assert tight.derivative_after < loose.derivative_after
    assert tight.fit_error > loose.fit_error


@pytest.mark.parametrize("bound", [1.0, BOUND, 20.0])
def test_largest_feature_frequency_is_the_bound(bound: float) -> None:
    features = SmoothTimeProjection(bound)
    times = torch.linspace(0, 1, 999)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(times, torch.ones_like(times))
        tangent = torch.autograd.forward_ad.unpack_dual(features(dual)).tangent
    assert bound * 0.8 < tangent.abs().max() <= bound * 1.001


def test_higher_bound_gives_smaller_fit_error() -> None:
    original = TrainedTime()
    errors = [SmoothTime(bound).refit(original, derivative_penalty=0.0).fit_error for bound in (1.0, 3.0, BOUND)]
    assert errors == sorted(errors, reverse=True)


def test_refit_does_not_depend_on_the_seed() -> None:
    original, first, second = TrainedTime(), SmoothTime(), SmoothTime()
    first.refit(original)
    torch.manual_seed(1)
    second.refit(original)
    assert torch.equal(first(torch.tensor([0.3])), second(torch.tensor([0.3])))


def test_largest_derivative_of_a_known_curve() -> None:
    def line(t: Tensor) -> Tensor:
        return torch.stack([3 * t, 4 * t], dim=-1)

    assert largest_derivative(line, torch.linspace(0.1, 0.9, 101)) == pytest.approx(5.0, rel=1e-2)
