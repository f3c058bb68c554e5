"""pi-Flow: a student that outputs a policy for a full step and imitates its teacher along it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.losses import Loss, PowerLoss
from lightning_distill.flow.path import expand, interpolate
from lightning_distill.methods.base import Objective
from lightning_distill.methods.calls import total_calls
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.methods.trajectory_regression import TrajectoryRegression
from lightning_distill.students.policy import position_weights, velocity_weights
from lightning_distill.teachers.model_adapter import Condition
from lightning_distill.teachers.student_options import StudentOptions

SMALLEST_TIME = 1e-3
"""Smallest time of the states along a policy, whose velocity is a difference of predictions of x0 divided by the time."""


class PiFlow(TrajectoryRegression):
    r"""Imitation distillation of policies (pi-Flow, arXiv 2510.14974, Algorithm 1), with its DX policy.

    For a step from t down to r, one forward of the student gives N outputs (`student.policy_points`), predictions of x0 at N
    times. They determine the motion along the step without further forwards (`students.policy`). The policy is followed,
    without gradient, to a state :math:`x_\tau`, and its velocity there is regressed onto the guided teacher's,

    .. math:: L = \| v_\pi(x_\tau, \tau) - \tilde v(x_\tau, \tau) \|^2, \quad r \le \tau \le t,

    at the policy's own states, so that errors do not accumulate. The end of the step is the end of the policy.

    The steps are those of the few-step sampling grids. They start from noised data or, for `trajectory_fraction`, from the end
    of the student's earlier steps on the same grid. The latter is the paper's data-free variant. Its mix of teacher and policy
    on the way to :math:`x_\tau`, early in training, and its GMFlow policy are not implemented. The student receives the end of
    its step.

    Args:
        nfe: Numbers of steps of the grid, each at least 1; each batch samples one.
        states: Number of states of each step at which the teacher is evaluated, at least 1; the paper's code uses 4 for
            FLUX.1-dev.
        loss: Loss of the policy's velocities.
        **kwargs: Of `TrajectoryRegression`. The student's trajectories follow its grid; `trajectory_steps` applies to the
            teacher's only.

    Raises:
        ConfigurationError: If settings are out of range, or the student has no policy.
    """

    learns_velocity: ClassVar[bool] = False

    def __init__(self, *args: Any, nfe: Sequence[int] = (4,), states: int = 4, loss: Loss = PowerLoss(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not nfe or min(nfe) < 1:
            raise ConfigurationError(f"model.nfe is {list(nfe)}; give numbers of steps of at least 1")
        if states < 1:
            raise ConfigurationError(f"model.states is {states}; set it to at least 1, 4 is usual")
        self.nfe = tuple(nfe)
        self.states = states
        self.loss = loss

    def check_student(self, options: StudentOptions) -> None:
        """Check also that the student has a policy."""
        if options.policy_points < 2:
            raise ConfigurationError(
                f"student.policy_points is {options.policy_points}, and PiFlow trains policies; set it to 2 or more, "
                "10 is usual"
            )
        super().check_student(options)

    def objective(self, x0: Tensor, condition: Condition) -> Objective:
        """Sample a step of a grid, and regress the student's policy onto the teacher along it."""
        nfe = self.nfe[self.networks.first_process(int(torch.randint(len(self.nfe), ())))]
        grid = self.networks.time_grid(nfe, x0)
        step = torch.randint(nfe, (len(x0),), device=x0.device)
        t, r = grid[step], grid[step + 1]
        guided = self.networks.guided_condition(condition)
        x_t = self.starts(x0, grid, step, guided)
        outputs = self.adapter.policy(self.student, x_t, r, t, guided.prompts, guided.scale)
        points = outputs.shape[1]
        losses = []
        for _ in range(self.states):
            tau = (r + (t - r) * torch.rand_like(t)).clamp(min=SMALLEST_TIME)
            u = mixture(outputs.detach(), position_weights(tau, r, t, points))
            x_tau = x_t - expand(t - tau, x_t) * u
            target = self.networks.teacher_velocity(x_tau, tau, guided)
            losses.append(self.loss(mixture(outputs, velocity_weights(tau, r, t, points)), target))
        return Objective(torch.stack(losses).mean(0), t)

    @torch.no_grad()
    def starts(self, x0: Tensor, grid: Tensor, step: Tensor, condition: GuidedCondition) -> Tensor:
        """Start states (B, C, h, w) of steps of a grid: noised data, or the end of the earlier steps from noise.

        Args:
            x0: Latents of the images (B, C, h, w).
            grid: Times (nfe + 1,), from 1 down to 0.
            step: Index of each sample's step (B,), 0 to nfe - 1.
            condition: Condition of the batch.
        """
        noise = torch.randn_like(x0)
        if self.trajectory_source == "teacher" or self.trajectory_fraction == 0:
            return self.training_states(x0, noise, grid[step], condition)
        own = torch.rand(len(x0), device=x0.device) < self.trajectory_fraction
        x = noise.clone()
        for index, (t, r) in enumerate(pairwise(grid[:-1])):
            rows, count = self.networks.rows_where(own & (step > index))
            if len(rows):
                moved = self.networks.student_step(x[rows], r.expand(len(rows)), t.expand(len(rows)), condition[rows])
                x[rows[:count]] = moved[:count]
        return torch.where(expand(own, x), x, interpolate(x0, noise, grid[step]))

    def expected_calls(self, phase: str) -> dict[str, float]:
        """One policy, the teacher at each state, and the earlier steps of trajectories, in a batch with all steps."""
        trajectory = self.trajectory_calls()
        if self.trajectory_fraction > 0 and self.trajectory_source == "student":
            trajectory = {"student": sum(self.nfe) / len(self.nfe) - 1}
        return total_calls({"student": 1, "student_backward": 1}, self.networks.teacher_calls(self.states), trajectory)


def mixture(outputs: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum (B, C, h, w), float32, of outputs (B, N, C, h, w) by weights (B, N).

    Weights may be large and cancel, so that they are not rounded to the lower precision of autocast.
    """
    with torch.autocast(outputs.device.type, enabled=False):
        return torch.einsum("bn,bnchw->bchw", weights, outputs.float())
