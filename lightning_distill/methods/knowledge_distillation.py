"""Knowledge distillation: regression onto the ends of the teacher's trajectories."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.losses import Loss, PowerLoss
from lightning_distill.flow.path import flow_step
from lightning_distill.flow.solvers import SOLVERS
from lightning_distill.methods.base import Objective, TeacherStudentBase
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.teachers.model_adapter import Condition


class KnowledgeDistillation(TeacherStudentBase):
    r"""Regression of the student's jumps onto the teacher's trajectories from noise (arXiv 2101.02388): a baseline.

    .. math:: L = \| x_t - (t - r) \, u(x_t, r, t) - x_r \|^2, \quad x_t, x_r \text{ on the trajectory of the guided teacher},

    with t and r neighbours on the few-step grid of sampling, drawn for each sample. One step, `nfe: [1]`, is the paper's. It
    needs prompts and no pictures; a trajectory is integrated for every batch, up to where the sample's segment ends.

    Args:
        nfe: Numbers of steps of the grid, each at least 1; one of these is drawn for each batch.
        solver: Of the teacher: "euler", "heun" or "midpoint".
        solver_steps: Of the teacher within each segment of the grid, at least 1, even on the sampling grid.
        loss: Of where the student's jump leads.
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
            raise ConfigurationError(f"model.solver_steps is {solver_steps}; take at least 1")
        self.nfe = tuple(nfe)
        self.solver = solver
        self.solver_steps = solver_steps
        self.loss = loss

    @property
    def needs_images(self) -> bool:
        """No: trajectories start from noise."""
        return False

    def objective(self, x0: Tensor, condition: Condition) -> Objective:
        """Draw a grid and a segment of it, integrate the teacher, and ask the student for the same jump."""
        nfe = self.nfe[self.first_process(int(torch.randint(len(self.nfe), ())))]
        grid = self.adapter.time_grid(nfe, tuple(x0.shape[1:])).to(x0.device)
        segment = torch.randint(nfe, (len(x0),), device=x0.device)
        guided = self.guided_condition(condition, len(x0))
        x_t, x_r = self.teacher_segment(torch.randn_like(x0), grid, segment, guided)
        t, r = grid[segment], grid[segment + 1]
        return Objective(self.loss(flow_step(x_t, self.average_velocity(x_t, r, t, guided), r, t), x_r), t)

    @torch.no_grad()
    def teacher_segment(
        self, noise: Tensor, grid: Tensor, segment: Tensor, condition: GuidedCondition
    ) -> tuple[Tensor, Tensor]:
        """States (B, C, h, w) of the teacher's trajectory where a segment of the grid starts and where it ends.

        Args:
            noise: Where trajectories start (B, C, h, w).
            grid: Times (nfe + 1,), from 1 down to 0.
            segment: Of each sample (B,), 0 to nfe - 1.
            condition: Of the batch.
        """
        start, x = noise, noise.clone()
        for place, (t, r) in enumerate(pairwise(grid)):
            start = torch.where((segment == place).reshape(-1, 1, 1, 1), x, start)
            rows, count = self.rows_where(segment >= place)
            if len(rows):
                times, ends = t.expand(len(rows)), r.expand(len(rows))
                moved = self.integrate_teacher(x[rows], ends, times, self.solver_steps, condition[rows], self.solver)
                x[rows[:count]] = moved[:count]
        return start, x
