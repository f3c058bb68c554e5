"""Training states of regressions: noised data, or states of trajectories from noise."""

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import interpolate
from lightning_distill.flow.solvers import SOLVERS
from lightning_distill.flow.times import substeps
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.methods.networks import GuidedCondition


class TrajectoryRegression(TeacherStudentBase):
    """Base of methods that regress at states x_t, which need not all be noised data.

    Noised data have the distribution of the teacher's trajectories without guidance. Guided trajectories lead elsewhere, and a
    regression at states off them need not hold along them.

    Args:
        trajectory_fraction: Share of the training states that are states of a trajectory from noise to t, in [0, 1]; the others
            are noised data. With 1, the data need only prompts.
        trajectory_source: Network of that trajectory: "student", as in sampling (backward distillation, arXiv 2405.05224), or
            "teacher". The teacher takes as many steps of the method's `solver`, of Heun's method if it has none.
        trajectory_steps: Largest number of steps of such a trajectory, at least 1; each batch samples a number.
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
            raise ConfigurationError(
                f"model.trajectory_fraction is {trajectory_fraction}; choose a share in [0, 1], 0 for noised data alone"
            )
        if trajectory_source not in ("student", "teacher"):
            raise ConfigurationError(f"model.trajectory_source is {trajectory_source!r}; choose student or teacher")
        if trajectory_steps < 1:
            raise ConfigurationError(f"model.trajectory_steps is {trajectory_steps}; set it to at least 1")
        self.trajectory_fraction = trajectory_fraction
        self.trajectory_source = trajectory_source
        self.trajectory_steps = trajectory_steps

    @property
    def needs_images(self) -> bool:
        """Whether some of the training states are noised data."""
        return self.trajectory_fraction < 1

    def training_states(self, x0: Tensor, noise: Tensor, t: Tensor, condition: GuidedCondition) -> Tensor:
        """States (B, C, h, w) at t (B,): noised data, and states of trajectories from the same noise."""
        x_t = interpolate(x0, noise, t)
        if self.trajectory_fraction > 0:
            rows, count = self.networks.rows_where(torch.rand(len(x0), device=x0.device) < self.trajectory_fraction)
            if len(rows):
                x_t[rows[:count]] = self.roll_out(noise[rows], t[rows], condition[rows])[:count]
        return x_t

    @torch.no_grad()
    def roll_out(self, noise: Tensor, t: Tensor, condition: GuidedCondition) -> Tensor:
        """States (B, C, h, w) at t (B,) after a random number of student or teacher steps from noise.

        A student of stochastic sampling predicts x0 and re-noises it in each step.
        """
        steps = self.networks.first_process(int(torch.randint(1, self.trajectory_steps + 1, ())))
        start = torch.ones_like(t)
        if self.trajectory_source == "teacher":
            return self.networks.integrate_teacher(noise, t, start, steps, condition, self.solver)
        x = noise
        for s, end in pairwise(substeps(start, t, steps, self.networks.grid_shift(noise))):
            if self.stochastic_sampling:
                x0 = self.networks.student_step(x, torch.zeros_like(end), s, condition)
                x = interpolate(x0, torch.randn_like(x), end)
            else:
                x = self.networks.student_step(x, end, s, condition)
        return x

    def fix_random_choices(self) -> None:
        """Roll out all training states or none, by one step."""
        super().fix_random_choices()
        self.trajectory_steps = 1
        if self.trajectory_fraction > 0:
            self.trajectory_fraction = 1.0

    def trajectory_calls(self) -> dict[str, float]:
        """Mean number of network calls of `training_states`."""
        if self.trajectory_fraction == 0:
            return {}
        steps = (self.trajectory_steps + 1) / 2
        if self.trajectory_source == "teacher":
            return self.networks.teacher_calls(steps * SOLVERS[self.solver].evaluations)
        return {"student": steps}
