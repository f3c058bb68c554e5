"""SplitMeanFlow: the average velocity over an interval from those over its two parts."""

from typing import Any

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.losses import Loss, PowerLoss
from lightning_distill.flow.path import expand, flow_step
from lightning_distill.flow.times import LogitNormal, TimeSampler, sample_interval
from lightning_distill.methods.base import Objective
from lightning_distill.methods.calls import total_calls
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.methods.trajectory_regression import TrajectoryRegression
from lightning_distill.teachers.model_adapter import Condition


class SplitMeanFlow(TrajectoryRegression):
    r"""Interval splitting consistency (SplitMeanFlow, arXiv 2507.16884).

    .. math:: u(x_t, r, t) = \mathrm{sg} \, \frac{(t - s) \, u(x_t, s, t) + (s - r) \, u(x_s, r, s)}{t - r}, \quad
        x_s = x_t - (t - s) \, u(x_t, s, t),

    with s uniform between r and t. The average velocity of any flow satisfies this identity. The boundary condition
    :math:`u(x_t, t, t) = \tilde v(x_t, t)` of the samples with r = t selects the flow of the guided teacher. A sample costs two
    forward passes of the student without gradient, or one of the teacher, and no derivative.

    Args:
        time_sampler: Distribution of the two times of an interval.
        equal_fraction: Share of samples with r = t, in (0, 1).
        loss: Loss of the regression.
        **kwargs: Of `TrajectoryRegression` and `TeacherStudentBase`.

    Raises:
        ConfigurationError: If equal_fraction is out of its range.
    """

    def __init__(
        self,
        *args: Any,
        time_sampler: TimeSampler = LogitNormal(),
        equal_fraction: float = 0.25,
        loss: Loss = PowerLoss(),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 < equal_fraction < 1:
            raise ConfigurationError(
                f"model.equal_fraction is {equal_fraction}; choose a share above 0, where the teacher is never evaluated, and "
                "below 1, where no step is trained; 0.25 is usual"
            )
        self.time_sampler = time_sampler
        self.equal_fraction = equal_fraction
        self.loss = loss

    def objective(self, x0: Tensor, condition: Condition) -> Objective:
        """Sample an interval and its split, and regress u onto the mean over the two parts."""
        interval = sample_interval(self.time_sampler, len(x0), self.equal_fraction, x0.device)
        r, t = interval.r, interval.t
        guided = self.networks.guided_condition(condition)
        x_t = self.training_states(x0, torch.randn_like(x0), t, guided)
        target = self.split_target(x_t, r, t, torch.rand_like(t), guided)
        return Objective(self.loss(self.networks.average_velocity(x_t, r, t, guided), target), t)

    @torch.no_grad()
    def split_target(self, x_t: Tensor, r: Tensor, t: Tensor, share: Tensor, condition: GuidedCondition) -> Tensor:
        """Target of u from t down to r (B, C, h, w): the guided velocity where r = t, otherwise the mean of two u.

        Args:
            x_t: States at t (B, C, h, w).
            r: Ends (B,).
            t: Starts (B,).
            share: Share of the interval before the split (B,), in [0, 1].
            condition: Condition of the batch.
        """
        target = torch.empty_like(x_t)
        equal, count = self.networks.rows_where(t <= r)
        if len(equal):
            target[equal[:count]] = self.networks.teacher_velocity(x_t[equal], t[equal], condition[equal])[:count]
        wide, count = self.networks.rows_where(t > r)
        if len(wide):
            start, end, split = t[wide], r[wide], torch.lerp(t[wide], r[wide], share[wide])
            first = self.networks.target_velocity(x_t[wide], split, start, condition[wide])
            x_s = flow_step(x_t[wide], first, split, start)
            second = self.networks.target_velocity(x_s, end, split, condition[wide])
            target[wide[:count]] = torch.lerp(second, first, expand(share[wide], first))[:count]
        return target

    def fix_random_choices(self) -> None:
        """Take r < t in all rows, and fix the choices of trajectories."""
        super().fix_random_choices()
        self.equal_fraction = 0.0

    def expected_calls(self, phase: str) -> dict[str, float]:
        """The student's u and those of both parts, the guided velocity where r = t, and the calls of trajectories."""
        student = {"student": 3, "student_backward": 1}
        return total_calls(student, self.networks.teacher_calls(), self.trajectory_calls())
