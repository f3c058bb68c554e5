"""Time samplers for training, and the time grid of few-step sampling."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError

TimesT = TypeVar("TimesT", float, Tensor)


class TimeSampler(ABC):
    """Distribution of training times on [0, 1]; 1 is noise."""

    @abstractmethod
    def __call__(
        self, batch: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Sample independent times (batch,), float32, in [0, 1]."""


@dataclass(frozen=True)
class LogitNormal(TimeSampler):
    """`t = 1 / (1 + exp(-z))` with `z ~ N(mean, std^2)` (arXiv 2403.03206, section 3.1).

    The defaults are those of MeanFlow (arXiv 2505.13447) and of its distillation (arXiv 2512.13006).

    Args:
        mean: Mean of z; the median of t is `1 / (1 + exp(-mean))`.
        std: Standard deviation of z, above 0.

    Raises:
        ConfigurationError: If mean is not finite, or std is not above 0.
    """

    mean: float = -0.4
    std: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        if not math.isfinite(self.mean):
            raise ConfigurationError(f"time_sampler.mean is {self.mean}; set it to a finite number, -0.4 is usual")
        if not 0 < self.std < math.inf:
            raise ConfigurationError(f"time_sampler.std is {self.std}; set it above 0, 1.0 is usual")

    def __call__(
        self, batch: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Sample independent times (batch,), float32; see `TimeSampler`."""
        z = torch.randn(batch, device=device, dtype=torch.float32, generator=generator)
        return torch.sigmoid(self.mean + self.std * z)


@dataclass(frozen=True)
class Uniform(TimeSampler):
    """Times that are uniform in [low, high), then shifted like a sampling grid.

    Args:
        low: Lower bound, at least 0.
        high: Upper bound, at most 1.
        shift: Shift as in `shift_times`, above 0; 1 leaves the times uniform, above 1 moves them toward noise.

    Raises:
        ConfigurationError: If `0 <= low < high <= 1` does not hold, or shift is not above 0.
    """

    low: float = 0.0
    high: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        if not 0 <= self.low < self.high <= 1:
            raise ConfigurationError(
                f"time_sampler.low is {self.low} and time_sampler.high is {self.high}; set 0 <= low < high <= 1"
            )
        if not 0 < self.shift < math.inf:
            raise ConfigurationError(f"time_sampler.shift is {self.shift}; set it above 0, 1 is uniform")

    def __call__(
        self, batch: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Sample independent times (batch,), float32; see `TimeSampler`."""
        uniform = torch.rand(batch, device=device, dtype=torch.float32, generator=generator)
        return shift_times(self.low + (self.high - self.low) * uniform, self.shift)


@dataclass(frozen=True)
class Interval:
    """A start and an end on the path for each sample.

    Args:
        r: Ends, the cleaner times, (B,), `r <= t`.
        t: Starts, the noisier times, (B,).
    """

    r: Tensor
    t: Tensor


def sample_interval(
    sampler: TimeSampler,
    batch: int,
    equal_fraction: float = 0.25,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Interval:
    """Sample two times per sample, sort them, and set `r = t` for a fraction (MeanFlow, arXiv 2505.13447, section 4.3).

    All rows have the same distribution, so the first ones get `r = t`. Their number is `equal_fraction * batch`. If that is no
    integer, one more row gets `r = t`, with the probability that makes the fraction right on average. This holds for a batch of
    1 as well.

    Args:
        sampler: Distribution of both times.
        batch: Number of samples, B.
        equal_fraction: Fraction of samples with `r = t`, in [0, 1]; 1 is flow matching.
        device: Device of the result, and of the generator if there is one.
        generator: Random number generator; None is torch's default.

    Returns:
        r and t, (B,), float32, `0 <= r <= t <= 1`.

    Raises:
        ConfigurationError: If equal_fraction is outside [0, 1].
    """
    if not 0 <= equal_fraction <= 1:
        raise ConfigurationError(f"equal_fraction is {equal_fraction}; set it between 0 and 1, 0.25 is usual")
    first, second = sampler(batch, device, generator), sampler(batch, device, generator)
    r, t = torch.minimum(first, second), torch.maximum(first, second)
    expected = round(equal_fraction * batch, 6)  # 0.29 * 100 is 28.999999999999996
    count, remainder = int(expected), expected % 1
    row = torch.arange(batch, device=device)
    equal = row < count
    if remainder:
        equal |= (row == count) & (torch.rand((), device=device, generator=generator) < remainder)
    return Interval(r=torch.where(equal, t, r), t=t)


def shift_times(t: TimesT, shift: float) -> TimesT:
    """Shift times toward noise, `shift t / (1 + (shift - 1) t)` (arXiv 2403.03206, Eq. 23).

    Args:
        t: In [0, 1], of any shape; 0 and 1 are unchanged.
        shift: Above 0; 1 changes nothing, above 1 shifts toward noise. It is `exp(mu)` of diffusers' FLUX scheduler.

    Returns:
        Shifted times, shaped like t.
    """
    return shift * t / (1 + (shift - 1) * t)


def move_on_grid(t: Tensor, step: float, shift: float = 1.0) -> Tensor:
    """Move times toward data by a distance on the sampling grid, and stop at 0.

    Args:
        t: Times in [0, 1], of any shape.
        step: Distance in the evenly spaced coordinate of the grid, at least 0. 1 is the full distance from noise to data, 1/8
            one of eight sampling steps.
        shift: Shift of the grid, as in `shift_times`.

    Returns:
        Times shaped like t, at most t.
    """
    even = shift_times(t, 1 / shift)  # the inverse of a shift is the shift by its reciprocal
    return shift_times((even - step).clamp_min(0), shift)


def substeps(t: Tensor, r: Tensor, steps: int, shift: float = 1.0) -> list[Tensor]:
    """Times from t to r in sub-steps that are even on the sampling grid.

    Args:
        t: Starts, (B,), in [0, 1].
        r: Ends, (B,), in [0, 1].
        steps: Number of sub-steps, at least 1.
        shift: Shift of the grid, as in `shift_times`.

    Returns:
        steps + 1 tensors (B,); the first is t itself, the last is r itself.
    """
    start, end = shift_times(t, 1 / shift), shift_times(r, 1 / shift)
    inner = [shift_times(torch.lerp(start, end, k / steps), shift) for k in range(1, steps)]
    # Rounding must neither leave the interval nor move a row with t = r.
    return [t, *(torch.clamp(time, torch.minimum(t, r), torch.maximum(t, r)) for time in inner), r]


def step_grid(nfe: int, shift: float = 1.0) -> Tensor:
    """Time grid of few-step sampling, evenly spaced and then shifted.

    The grid is computed in float64 on the CPU and rounded once, so that an exported pipeline reproduces it bit for bit.

    Args:
        nfe: Number of steps, at least 1.
        shift: Shift as in `shift_times`, above 0.

    Returns:
        Times (nfe + 1,), float32, on the CPU, decreasing from exactly 1 to exactly 0.

    Raises:
        ConfigurationError: If nfe is less than 1, or shift is not above 0.
    """
    if nfe < 1:
        raise ConfigurationError(f"nfe is {nfe}; set it to at least 1")
    if not shift > 0:
        raise ConfigurationError(f"shift is {shift}; set it above 0, 1 is an even grid")
    even = torch.linspace(1, 0, nfe + 1, dtype=torch.float64, device="cpu")
    return shift_times(even, shift).to(torch.float32)
