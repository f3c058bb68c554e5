"""Settings of validation, and the error of the student's average velocity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import interpolate
from lightning_distill.flow.solvers import integrate

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function from state (B, C, h, w), end r (B,) and start t (B,) to a velocity (B, C, h, w)."""


@dataclass(frozen=True)
class ValidationOptions:
    """Settings of validation.

    Args:
        nfe: Numbers of sampling steps at which the student's images are scored.
        teacher_nfe: Sampling steps of the teacher in comparisons.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        seed: Offset of the noise seeds; image i of the validation set starts from seed + i.
        average_velocity: Whether to measure `val/average_velocity_error`.
        intervals: Intervals (r, t) at which that error is measured, 0 <= r < t <= 1.
        solver_steps: Heun steps of the teacher's reference solution over an interval, even on the sampling grid.
        samples: Images of the first validation batch that the error is measured on.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    nfe: Sequence[int] = (1, 2, 4, 8)
    teacher_nfe: int = 32
    height: int = 32
    width: int = 32
    seed: int = 0
    average_velocity: bool = True
    intervals: Sequence[tuple[float, float]] = ((0.0, 1.0), (0.5, 1.0), (0.0, 0.5), (0.25, 0.75))
    solver_steps: int = 16
    samples: int = 32

    def __post_init__(self) -> None:
        if not self.nfe or min(self.nfe) < 1:
            raise ConfigurationError(f"validation.nfe is {list(self.nfe)}; give numbers of steps of at least 1")
        if len(set(self.nfe)) < len(self.nfe):
            raise ConfigurationError(f"validation.nfe is {list(self.nfe)}; give each number of steps once")
        for name in ("teacher_nfe", "height", "width", "solver_steps", "samples"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"validation.{name} is {getattr(self, name)}; set it to at least 1")
        for r, t in self.intervals:
            if not 0 <= r < t <= 1:
                raise ConfigurationError(f"validation.intervals has {[r, t]}; give (r, t) with 0 <= r < t <= 1")


@dataclass(frozen=True)
class AverageVelocityReference:
    """Average velocities of the teacher on a fixed batch over fixed intervals, finely integrated once.

    Attributes:
        x_t: Noisy latents (B, C, h, w) of each interval.
        r: End of each interval (B,).
        t: Start of each interval (B,).
        u: The teacher's average velocity (B, C, h, w) over each interval.
    """

    x_t: list[Tensor]
    r: list[Tensor]
    t: list[Tensor]
    u: list[Tensor]

    @classmethod
    @torch.no_grad()
    def measure(
        cls,
        teacher_velocity: Velocity,
        noise: Tensor,
        x0: Tensor | None,
        intervals: Sequence[tuple[float, float]],
        solver_steps: int,
        shift: float,
    ) -> AverageVelocityReference:
        """Integrate the guided teacher by Heun's method.

        Args:
            teacher_velocity: The guided teacher's velocity.
            noise: Noise (B, C, h, w).
            x0: Latents (B, C, h, w) whose noisy versions are the starting states; None starts from states of the teacher's own
                trajectories.
            intervals: Intervals (r, t).
            solver_steps: Heun steps over an interval, even on the sampling grid.
            shift: Shift of the sampling grid.
        """
        result = cls([], [], [], [])

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return teacher_velocity(x, t, t)

        def move(x: Tensor, start: Tensor, end: Tensor) -> Tensor:
            return integrate(velocity, x, start, end, solver_steps, "heun", shift)

        for end, start in intervals:
            r, t = (torch.full((len(noise),), time, device=noise.device) for time in (end, start))
            x_t = move(noise, torch.ones_like(t), t) if x0 is None else interpolate(x0, noise, t)
            result.x_t.append(x_t)
            result.r.append(r)
            result.t.append(t)
            result.u.append((x_t - move(x_t, t, r)) / (start - end))
        return result

    @torch.no_grad()
    def relative_error(self, student_velocity: Velocity) -> Tensor:
        """Mean over samples and intervals of `||u - u_T|| / ||u_T||` for the student's average velocity u."""
        errors = []
        for x_t, r, t, u in zip(self.x_t, self.r, self.t, self.u, strict=True):
            error = (student_velocity(x_t, r, t) - u).flatten(1).norm(dim=1)
            errors.append(error / u.flatten(1).norm(dim=1))
        return torch.cat(errors).mean()
