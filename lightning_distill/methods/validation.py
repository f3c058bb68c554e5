"""What validation measures of a student, apart from its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import interpolate
from lightning_distill.flow.solvers import integrate
from lightning_distill.teachers.model_adapter import Condition

if TYPE_CHECKING:
    from lightning_distill.methods.evaluation import SamplingModule


@dataclass(frozen=True)
class ValidationOptions:
    """What validation measures.

    Args:
        nfe: Numbers of steps at which the student's pictures are scored.
        teacher_nfe: Steps of the teacher it is compared with.
        height: Height of the pictures in pixels.
        width: Width of the pictures in pixels.
        seed: Offset of the noise seeds; picture i of the validation set starts from seed + i.
        average_velocity: Whether to measure `val/average_velocity_error`.
        intervals: The (r, t) at which it is measured.
        solver_steps: Heun steps of the teacher's reference solution over an interval, even on the sampling grid.
        samples: Pictures of the first validation batch that the error is measured on.

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
        for name in ("teacher_nfe", "height", "width", "solver_steps", "samples"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"validation.{name} is {getattr(self, name)}; take at least 1")
        for r, t in self.intervals:
            if not 0 <= r < t <= 1:
                raise ConfigurationError(f"validation.intervals has {[r, t]}; give (r, t) with 0 <= r < t <= 1")


@dataclass(frozen=True)
class AverageVelocityReference:
    """The teacher's average velocities on a fixed batch, over fixed intervals, finely integrated once.

    Attributes:
        x_t: Noisy latents (B, C, h, w) of each interval.
        r: End of each interval (B,).
        t: Start of each interval (B,).
        u: The teacher's average velocity (B, C, h, w) over each interval.
        condition: Of the batch's prompts.
    """

    x_t: list[Tensor]
    r: list[Tensor]
    t: list[Tensor]
    u: list[Tensor]
    condition: Condition

    @classmethod
    @torch.no_grad()
    def measure(cls, module: SamplingModule, batch: dict[str, Any]) -> AverageVelocityReference:
        """Integrate the guided teacher of `module` by Heun's method.

        From noisy versions of the batch's pictures, or, where it has none, from states of the teacher's own trajectories.
        """
        options = module.validation
        prompts = batch["prompt"][: options.samples]
        # All of the batch is encoded, as where it comes encoded: the last bits depend on the number of samples.
        x0 = module.latents(batch)[: len(prompts)] if "image" in batch or "latents" in batch else None
        condition = {name: value[: len(prompts)] for name, value in module.condition(batch).items()}
        null = module.null_condition(len(prompts))
        shape = module.latent_shape if x0 is None else x0.shape[1:]
        noise = torch.randn(len(prompts), *shape, generator=torch.Generator().manual_seed(options.seed)).to(module.device)
        shift = module.adapter.time_shift(tuple(shape))
        result = cls([], [], [], [], condition)

        def teacher_velocity(x: Tensor, t: Tensor) -> Tensor:
            return module.sampling_velocity(x, t, t, condition, null, "teacher")

        def move(x: Tensor, start: Tensor, end: Tensor) -> Tensor:
            return integrate(teacher_velocity, x, start, end, options.solver_steps, "heun", shift)

        for end, start in module.measured_intervals:
            r, t = (torch.full((len(prompts),), time, device=module.device) for time in (end, start))
            x_t = move(noise, torch.ones_like(t), t) if x0 is None else interpolate(x0, noise, t)
            result.x_t.append(x_t)
            result.r.append(r)
            result.t.append(t)
            result.u.append((x_t - move(x_t, t, r)) / (start - end))
        return result

    @torch.no_grad()
    def relative_error(self, module: SamplingModule) -> Tensor:
        """Mean over samples and intervals of `||u - u_T|| / ||u_T||` for the student that `module` would sample from."""
        errors = []
        for x_t, r, t, u in zip(self.x_t, self.r, self.t, self.u, strict=True):
            student = module.sampling_velocity(x_t, r, t, self.condition, self.condition, "student")
            errors.append((student - u).flatten(1).norm(dim=1) / u.flatten(1).norm(dim=1))
        return torch.cat(errors).mean()
