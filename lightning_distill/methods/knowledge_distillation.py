"""Knowledge distillation: regression of steps onto the teacher's trajectories."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.losses import Loss, PowerLoss
from lightning_distill.flow.path import flow_step
from lightning_distill.flow.solvers import SOLVERS, evaluations
from lightning_distill.methods.base import Objective, TeacherStudentBase
from lightning_distill.methods.calls import total_calls
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.teachers.model_adapter import Condition


class KnowledgeDistillation(TeacherStudentBase):
    r"""Regression of the student's steps onto the teacher's trajectories from noise (arXiv 2101.02388): a baseline.

    .. math:: L = \| x_t - (t - r) \, u(x_t, r, t) - x_r \|^2, \quad x_t, x_r \text{ on the trajectory of the guided teacher},

    with t and r neighbours on the few-step sampling grid, sampled for each sample. One step, `nfe: [1]`, is the paper's.
    Prompts suffice as data. Each batch integrates trajectories up to the end of each sample's interval.

    Args:
        nfe: Numbers of steps of the grid, each at least 1; each batch samples one.
        solver: Solver of the teacher: "euler", "heun" or "midpoint".
        solver_steps: Steps of the teacher within each interval of the grid, at least 1, even on the sampling grid.
        loss: Loss of the end of the student's step.
        **kwargs: Of `TeacherStudentBase`.

    Raises:
        ConfigurationError: If settings are out of range.
    """

    learns_velocity: ClassVar[bool] = False

    def __init__(
        self,
        *args: Any,
        nfe: Sequence[int] = (1, 2, 4),
        solver: str = "heun",
        solver_steps: int = 8,
        loss: Loss = PowerLoss(),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not nfe or min(nfe) < 1:
            raise ConfigurationError(f"model.nfe is {list(nfe)}; give numbers of steps of at least 1")
        if solver not in SOLVERS:
            raise ConfigurationError(f"model.solver is {solver!r}; choose one of {', '.join(SOLVERS)}")
        if solver_steps < 1:
            raise ConfigurationError(f"model.solver_steps is {solver_steps}; set it to at least 1")
        self.nfe = tuple(nfe)
        self.solver = solver
        self.solver_steps = solver_steps
        self.loss = loss

    @property
    def needs_images(self) -> bool:
        """False: trajectories start from noise."""
        return False

    def objective(self, x0: Tensor, condition: Condition) -> Objective:
        """Sample an interval of a grid, integrate the teacher over it, and regress the student's step onto it."""
        nfe = self.nfe[self.networks.first_process(int(torch.randint(len(self.nfe), ())))]
        grid = self.networks.time_grid(nfe, x0)
        segment = torch.randint(nfe, (len(x0),), device=x0.device)
        guided = self.networks.guided_condition(condition)
        x_t, x_r = self.teacher_segment(torch.randn_like(x0), grid, segment, guided)
        t, r = grid[segment], grid[segment + 1]
        return Objective(self.loss(flow_step(x_t, self.networks.average_velocity(x_t, r, t, guided), r, t), x_r), t)

    @torch.no_grad()
    def teacher_segment(
        self, noise: Tensor, grid: Tensor, segment: Tensor, condition: GuidedCondition
    ) -> tuple[Tensor, Tensor]:
        """States (B, C, h, w) of the teacher's trajectory at the start and the end of an interval of the grid.

        Args:
            noise: Start of the trajectories (B, C, h, w).
            grid: Times (nfe + 1,), from 1 down to 0.
            segment: Index of each sample's interval (B,), 0 to nfe - 1.
            condition: Condition of the batch.
        """
        start, x = noise, noise.clone()
        for index, (t, r) in enumerate(pairwise(grid)):
            start = torch.where((segment == index).reshape(-1, 1, 1, 1), x, start)
            rows, count = self.networks.rows_where(segment >= index)
            if len(rows):
                times, ends = t.expand(len(rows)), r.expand(len(rows))
                moved = self.networks.integrate_teacher(x[rows], ends, times, self.solver_steps, condition[rows], self.solver)
                x[rows[:count]] = moved[:count]
        return start, x

    def fix_random_choices(self) -> None:
        """Integrate one interval, from noise to data."""
        super().fix_random_choices()
        self.nfe = (1,)

    def expected_calls(self, phase: str) -> dict[str, float]:
        """One student step, and the teacher over all intervals of a grid, in a batch with samples of each."""
        intervals = sum(self.nfe) / len(self.nfe)
        teacher = self.networks.teacher_calls(intervals * evaluations(self.solver, self.solver_steps))
        return total_calls({"student": 1, "student_backward": 1}, teacher)
