"""Where a regression looks: at noised pictures, or at the states that sampling goes through."""

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import interpolate
from lightning_distill.flow.times import substeps
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.methods.networks import GuidedCondition


class TrajectoryStates(TeacherStudentBase):
    """A method that regresses at given states x_t, which need not all be noised data.

    Noised data have the distribution of the teacher's trajectories without guidance. A guided one leads elsewhere, and what is
    learned at states that it does not reach need not hold where it goes.

    Args:
        trajectory_fraction: Share of the training states that are not noised data but states of a trajectory from noise to t,
            in [0, 1]. With 1, no data but prompts are needed.
        trajectory_source: Whose trajectory: "student", where sampling asks the student (backward distillation, arXiv
            2405.05224), or "teacher", by as many steps of the method's `solver`, of Heun's where it has none.
        trajectory_steps: Most jumps of such a trajectory; the number is drawn for each batch.
        **kwargs: Of `TeacherStudentBase`.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    solver: str = "heun"

    def __init__(
        self,
        *args: Any,
        trajectory_fraction: float = 0.0,
        trajectory_source: Literal["student", "teacher"] = "student",
        trajectory_steps: int = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= trajectory_fraction <= 1:
            raise ConfigurationError(f"model.trajectory_fraction is {trajectory_fraction}; choose a share in [0, 1], 0 is none")
        if trajectory_source not in ("student", "teacher"):
            raise ConfigurationError(f"model.trajectory_source is {trajectory_source!r}; choose student or teacher")
        if trajectory_steps < 1:
            raise ConfigurationError(f"model.trajectory_steps is {trajectory_steps}; take at least 1")
        self.trajectory_fraction = trajectory_fraction
        self.trajectory_source = trajectory_source
        self.trajectory_steps = trajectory_steps

    @property
    def needs_images(self) -> bool:
        """Whether some of the training states are noised data."""
        return self.trajectory_fraction < 1

    def training_states(self, x0: Tensor, noise: Tensor, t: Tensor, condition: GuidedCondition) -> Tensor:
        """States at t (B,), of noised data and of trajectories from the same noise, (B, C, h, w) as x0 and noise."""
        x_t = interpolate(x0, noise, t)
        if self.trajectory_fraction > 0:
            rows, count = self.rows_where(torch.rand(len(x0), device=x0.device) < self.trajectory_fraction)
            if len(rows):
                x_t[rows[:count]] = self.roll_out(noise[rows], t[rows], condition[rows])[:count]
        return x_t

    @torch.no_grad()
    def roll_out(self, noise: Tensor, t: Tensor, condition: GuidedCondition) -> Tensor:
        """States (B, C, h, w) that are reached at t (B,) from noise, in a random number of jumps or teacher's steps.

        A student of stochastic sampling goes to data and back by fresh noise in each.
        """
        jumps = self.first_process(int(torch.randint(1, self.trajectory_steps + 1, ())))
        start = torch.ones_like(t)
        if self.trajectory_source == "teacher":
            return self.integrate_teacher(noise, t, start, jumps, condition, self.solver)
        x = noise
        for s, end in pairwise(substeps(start, t, jumps, self.grid_shift(noise))):
            if self.stochastic_sampling:
                x = interpolate(self.student_step(x, torch.zeros_like(end), s, condition), torch.randn_like(x), end)
            else:
                x = self.student_step(x, end, s, condition)
        return x
