"""pi-Flow: a student that says once what a whole step does, and imitates its teacher all along it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.losses import Loss, PowerLoss
from lightning_distill.flow.path import expand, interpolate
from lightning_distill.methods.base import Objective
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.methods.trajectory_regression import TrajectoryStates
from lightning_distill.students.policy import position_weights, velocity_weights
from lightning_distill.teachers.model_adapter import Condition
from lightning_distill.teachers.student_options import StudentOptions

SMALLEST_TIME = 1e-3
"""Of the states along a policy: its velocity there is a difference of predictions of x0, divided by the time."""


class PiFlow(TrajectoryStates):
    r"""Imitation distillation of policies (pi-Flow, arXiv 2510.14974, Algorithm 1), with its DX policy.

    For a step from t down to r the student gives N outputs at once (`student.policy_points`), predictions of x0 at as many
    times, which say how the state moves all along the step without asking the network again (`models.policy`). The policy is
    followed, without gradient, to a state :math:`x_\tau`, and its velocity there is regressed onto the guided teacher's,

    .. math:: L = \| v_\pi(x_\tau, \tau) - \tilde v(x_\tau, \tau) \|^2, \quad r \le \tau \le t,

    at the policy's own states, so that errors are not added up. The end of the step is where the policy leads.

    Steps are those of the few-step grids of sampling; their starts are noised data or, by `trajectory_fraction`, where the
    student has come to by the steps before on the same grid (the paper's data-free variant). The paper's mix of teacher and
    policy on the way to :math:`x_\tau`, at the beginning of training, and its GMFlow policy are left out; the student is told
    where its step ends.

    Args:
        nfe: Numbers of steps of the grid, each at least 1; one of these is drawn for each batch.
        states: States of each step at which the teacher is asked, at least 1; the paper's code takes 4 for FLUX.1-dev.
        loss: Of the policy's velocities.
        **kwargs: Of `TrajectoryStates`. The student's trajectories are of its grid, `trajectory_steps` of the teacher's only.

    Raises:
        ConfigurationError: If settings are out of range, or the student has no policy.
    """

    learns_velocity: ClassVar[bool] = False

    def __init__(self, *args: Any, nfe: Sequence[int] = (4,), states: int = 4, loss: Loss = PowerLoss(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not nfe or min(nfe) < 1:
            raise ConfigurationError(f"model.nfe is {list(nfe)}; give numbers of steps of at least 1")
        if states < 1:
            raise ConfigurationError(f"model.states is {states}; take at least 1, 4 is usual")
        self.nfe = tuple(nfe)
        self.states = states
        self.loss = loss

    def check_student(self, options: StudentOptions) -> None:
        """Refuse a student without a policy as well."""
        if options.policy_points < 2:
            raise ConfigurationError(
                f"student.policy_points is {options.policy_points}, and PiFlow trains policies; set it to 2 or more, "
                "10 is usual"
            )
        super().check_student(options)

    def objective(self, x0: Tensor, condition: Condition) -> Objective:
        """Draw a step of a grid, ask the student for its policy, and the teacher along it."""
        nfe = self.nfe[self.first_process(int(torch.randint(len(self.nfe), ())))]
        grid = self.adapter.time_grid(nfe, tuple(x0.shape[1:])).to(x0.device)
        step = torch.randint(nfe, (len(x0),), device=x0.device)
        t, r = grid[step], grid[step + 1]
        guided = self.guided_condition(condition, len(x0))
        x_t = self.starts(x0, grid, step, guided)
        outputs = self.adapter.policy(self.student, x_t, r, t, guided.prompts, guided.scale)
        points = outputs.shape[1]
        losses = []
        for _ in range(self.states):
            tau = (r + (t - r) * torch.rand_like(t)).clamp(min=SMALLEST_TIME)
            u = mixture(outputs.detach(), position_weights(tau, r, t, points))
            x_tau = x_t - expand(t - tau, x_t) * u
            target = self.teacher_velocity(x_tau, tau, guided)
            losses.append(self.loss(mixture(outputs, velocity_weights(tau, r, t, points)), target))
        return Objective(torch.stack(losses).mean(0), t)

    @torch.no_grad()
    def starts(self, x0: Tensor, grid: Tensor, step: Tensor, condition: GuidedCondition) -> Tensor:
        """States (B, C, h, w) at which steps of a grid start: noised data, or where the steps before have led from noise.

        Args:
            x0: Latents of the pictures, (B, C, h, w).
            grid: Times (nfe + 1,), from 1 down to 0.
            step: Of each sample (B,), 0 to nfe - 1.
            condition: Of the batch.
        """
        noise = torch.randn_like(x0)
        if self.trajectory_source == "teacher" or self.trajectory_fraction == 0:
            return self.training_states(x0, noise, grid[step], condition)
        own = torch.rand(len(x0), device=x0.device) < self.trajectory_fraction
        x = noise.clone()
        for place, (t, r) in enumerate(pairwise(grid[:-1])):
            rows, count = self.rows_where(own & (step > place))
            if len(rows):
                moved = self.student_step(x[rows], r.expand(len(rows)), t.expand(len(rows)), condition[rows])
                x[rows[:count]] = moved[:count]
        return torch.where(expand(own, x), x, interpolate(x0, noise, grid[step]))


def mixture(outputs: Tensor, weights: Tensor) -> Tensor:
    """Of outputs (B, N, C, h, w) by weights (B, N): (B, C, h, w), float32.

    Weights may be large and cancel, so that they are not rounded to the lower of mixed precisions.
    """
    with torch.autocast(outputs.device.type, enabled=False):
        return torch.einsum("bn,bnchw->bchw", weights, outputs.float())
