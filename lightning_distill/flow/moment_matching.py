"""Inductive moment matching (IMM, arXiv 2503.07565): times, weights and kernels that compare groups of particles.

Particles are (G, M, D): G groups of M flattened states. Values for each group are (G,).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError


def constant_decrement(t: Tensor, s: Tensor, step: float, eta_max: float) -> Tensor:
    """Time r in [s, t], a constant step below t in the noise-to-data ratio `eta = t / (1 - t)`.

    Eta is unbounded toward t = 1, where sampling starts. Times beyond `eta_max / (1 + eta_max)` therefore get the same r as
    that time, so that r < t for every t.

    Args:
        t: Starts (G,), in [0, 1].
        s: Lower bounds of r (G,), in [0, t].
        step: Step of eta, above 0.
        eta_max: Largest eta that a step is taken from, above `step`.

    Returns:
        r (G,), in [s, t].
    """
    eta = ((t / (1 - t)).clamp_max(eta_max) - step).clamp_min(0)
    return torch.maximum(torch.minimum(eta / (1 + eta), t), s)


def time_weight(t: Tensor, power: float, bias: float) -> Tensor:
    r"""Weight of the discrepancy at t (arXiv 2503.07565), for the path with :math:`\alpha = 1 - t, \sigma = t`.

    .. math:: w(t) = \frac12 \, \mathrm{sigmoid}(b - \lambda_t) \Big(-\frac{d\lambda_t}{dt}\Big)
        \frac{\alpha^a}{\alpha^2 + \sigma^2}, \quad \lambda_t = \log \frac{\alpha^2}{\sigma^2}.

    Args:
        t: (G,), in [0, 1].
        power: a, at least 1, which makes the weight finite at t = 1.
        bias: b.

    Returns:
        w (G,).
    """
    # The product is simplified: lambda and its derivative are infinite at both ends, but the weight is finite.
    data, noise = (1 - t).square(), t.square()
    ratio = torch.exp(torch.tensor(-bias, dtype=t.dtype, device=t.device))
    return t * (1 - t) ** (power - 1) / ((noise + ratio * data) * (noise + data))


class Kernel(ABC):
    """Configurable kernel of particles."""

    @abstractmethod
    def __call__(self, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        """Compute k(x_i, y_j) of all pairs within a group.

        Args:
            x: Particles (G, M, D).
            y: Particles (G, M, D).
            scale: Unit of length for distances (G,): the length of the steps that led to x and y.

        Returns:
            Kernel values, (G, M, M).
        """


@dataclass(frozen=True)
class LaplaceKernel(Kernel):
    r"""Laplace kernel :math:`\exp(-\max(\| x - y \|, \epsilon) / (D c))` with the scale c (arXiv 2503.07565).

    Args:
        epsilon: Distance below which there is no gradient, above 0.

    Raises:
        ConfigurationError: If epsilon is not above 0.
    """

    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)

    def __call__(self, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:  # noqa: D102
        return torch.exp(-_distances(x, y, scale, self.epsilon))


@dataclass(frozen=True)
class RBFKernel(Kernel):
    r"""RBF kernel :math:`\exp(-\frac12 d^2)` of the Laplace kernel's distance, :math:`d = \max(\| x - y \|, \epsilon) / (D c)`.

    Args:
        epsilon: Distance below which there is no gradient, above 0.

    Raises:
        ConfigurationError: If epsilon is not above 0.
    """

    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)

    def __call__(self, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:  # noqa: D102
        return torch.exp(-_distances(x, y, scale, self.epsilon).square() / 2)


def discrepancy(y: Tensor, z: Tensor, kernel: Kernel, scale: Tensor) -> Tensor:
    r"""Squared maximum mean discrepancy of two sets of particles, the V-statistic (arXiv 2503.07565).

    .. math:: \frac{1}{M^2} \sum_{i, j} k(y_i, y_j) + k(z_i, z_j) - 2 k(y_i, z_j).

    Args:
        y: Particles (G, M, D).
        z: Particles (G, M, D).
        kernel: Kernel k.
        scale: Scale of the kernel (G,).

    Returns:
        Discrepancy (G,): at least 0 for a positive definite kernel, and 0 for equal sets.
    """
    return (kernel(y, y, scale) + kernel(z, z, scale) - 2 * kernel(y, z, scale)).mean((1, 2))


def _distances(x: Tensor, y: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    norms = torch.linalg.vector_norm(x[:, :, None] - y[:, None], dim=-1).clamp_min(epsilon)
    # A step of length 0 has a scale of 0. Its particles do not move, and have no gradient.
    return norms / (x.shape[-1] * scale.clamp_min(torch.finfo(scale.dtype).eps)[:, None, None])


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon < math.inf:
        raise ConfigurationError(f"kernel.epsilon is {epsilon}; set it above 0, 1e-8 is usual")
