"""Losses of an average velocity, or of the state that it leads to, against a target, one value per sample.

The squared norm of an error is the mean over a sample's entries. Values, `c` and learning rates therefore carry over to other
latent sizes. (MeanFlow's code takes the sum over D entries: its c is D times this one.)
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lightning_distill.errors import ConfigurationError


def power_loss(u: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Power of the squared error, `(||u - u*||^2) ^ gamma` (arXiv 2512.13006, which reports gamma = 2 best).

    Args:
        u: Average velocity, (B, ...).
        target: u*, (B, ...), without gradient.
        gamma: Exponent, at least 1; 1 is the mean squared error.

    Returns:
        Loss, (B,).

    Raises:
        ConfigurationError: If gamma is less than 1. The gradient would be NaN at an error of 0, where an identical student
            starts.
    """
    if not 1 <= gamma < math.inf:
        raise ConfigurationError(f"gamma is {gamma}; set it to at least 1, or use the adaptive loss with p = 1 - gamma")
    return _squared_norm(u - target) ** gamma


def adaptive_loss(u: Tensor, target: Tensor, p: float, c: float = 1e-3) -> Tensor:
    """Adaptively weighted squared error, `sg[w] ||u - u*||^2` with `w = 1 / (||u - u*||^2 + c)^p`.

    Its gradient equals that of the power loss with `gamma = 1 - p`, up to c and a constant factor. Source: MeanFlow, arXiv
    2505.13447, section 4.3, with p = 1; p = 0.5 is like the pseudo-Huber loss.

    Args:
        u: Average velocity, (B, ...).
        target: u*, (B, ...), without gradient.
        p: Strength; 0 is the mean squared error, 1 makes every sample's loss about 1.
        c: Constant that bounds the weight of a vanishing error, above 0.

    Returns:
        Loss, (B,).

    Raises:
        ConfigurationError: If p is not finite, or c is not above 0.
    """
    if not math.isfinite(p):
        raise ConfigurationError(f"p of the adaptive loss is {p}; set it to a finite number, 1 is usual")
    if not 0 < c < math.inf:
        raise ConfigurationError(f"c of the adaptive loss is {c}; set it above 0, 0.001 is usual")
    error = _squared_norm(u - target)
    return error / (error.detach() + c) ** p


def pseudo_huber_loss(u: Tensor, target: Tensor, c: float = 5.4e-4) -> Tensor:
    """Pseudo-Huber loss, `sqrt(||u - u*||^2 + c^2) - c`: quadratic for errors below c, linear above (arXiv 2310.14189).

    The paper, on consistency models, sets c = 0.00054 sqrt(D) for the sum over D entries, which is 0.00054 here.

    Args:
        u: Prediction, (B, ...).
        target: Target of the prediction, (B, ...), without gradient.
        c: Error above which the loss is linear, above 0.

    Returns:
        Loss, (B,).

    Raises:
        ConfigurationError: If c is not above 0.
    """
    if not 0 < c < math.inf:
        raise ConfigurationError(f"c of the pseudo-Huber loss is {c}; set it above 0, 0.00054 is usual")
    return (_squared_norm(u - target) + c**2).sqrt() - c


def _squared_norm(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(1)


class Loss(ABC):
    """Configurable loss of an average velocity, or of the state that it leads to, against a target."""

    @abstractmethod
    def __call__(self, u: Tensor, target: Tensor) -> Tensor:
        """Compute the loss (B,) of u against the target, (B, ...) each."""


@dataclass(frozen=True)
class PowerLoss(Loss):
    """`power_loss` with its exponent as a setting.

    Args:
        gamma: Exponent, at least 1; 1 is the mean squared error.

    Raises:
        ConfigurationError: If gamma is less than 1.
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.gamma < math.inf:
            raise ConfigurationError(
                f"loss.gamma is {self.gamma}; set it to at least 1, or use AdaptiveLoss with p = 1 - gamma"
            )

    def __call__(self, u: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        return power_loss(u, target, self.gamma)


@dataclass(frozen=True)
class AdaptiveLoss(Loss):
    """`adaptive_loss` with its strength as a setting.

    Args:
        p: Strength, at least 0; 0 is the mean squared error, 1 makes every sample's loss about 1.
        c: Constant that bounds the weight of a vanishing error, above 0.

    Raises:
        ConfigurationError: If p is negative, or c is not above 0.
    """

    p: float = 1.0
    c: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.p < math.inf:
            raise ConfigurationError(f"loss.p is {self.p}; set it to 0 or more, or use PowerLoss with gamma = 1 - p")
        if not 0 < self.c < math.inf:
            raise ConfigurationError(f"loss.c is {self.c}; set it above 0, 0.001 is usual")

    def __call__(self, u: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        return adaptive_loss(u, target, self.p, self.c)


@dataclass(frozen=True)
class PseudoHuberLoss(Loss):
    """`pseudo_huber_loss` with its threshold as a setting.

    Args:
        c: Error above which the loss is linear, above 0.

    Raises:
        ConfigurationError: If c is not above 0.
    """

    c: float = 5.4e-4

    def __post_init__(self) -> None:
        if not 0 < self.c < math.inf:
            raise ConfigurationError(f"loss.c is {self.c}; set it above 0, 0.00054 is usual")

    def __call__(self, u: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        return pseudo_huber_loss(u, target, self.c)
