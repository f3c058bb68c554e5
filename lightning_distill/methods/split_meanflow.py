"""SplitMeanFlow: a jump is what two shorter ones make of it."""

from typing import Any

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.losses import Loss, PowerLoss
from lightning_distill.flow.path import expand, flow_step
from lightning_distill.flow.times import LogitNormal, TimeSampler, sample_interval
from lightning_distill.methods.base import Objective
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.methods.trajectory_regression import TrajectoryStates
from lightning_distill.teachers.model_adapter import Condition


class SplitMeanFlow(TrajectoryStates):
    r"""Interval splitting consistency (SplitMeanFlow, arXiv 2507.16884).

    .. math:: u(x_t, r, t) = \mathrm{sg} \, \frac{(t - s) \, u(x_t, s, t) + (s - r) \, u(x_s, r, s)}{t - r}, \quad
        x_s = x_t - (t - s) \, u(x_t, s, t),

    with s uniform between r and t. The average velocity of any flow fulfils it; that of the guided teacher is singled out by
    :math:`u(x_t, t, t) = \tilde v(x_t, t)` for the samples with r = t. A sample takes two forward passes of the student
    without gradient, or one of the teacher, and no derivative.

    Args:
        time_sampler: Distribution of the two times of an interval.
        equal_fraction: Share of samples with r = t, in (0, 1).
        loss: Of the regression.
        **kwargs: Of `TrajectoryStates` and `TeacherStudentBase`.

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
                f"model.equal_fraction is {equal_fraction}; choose a share between 0, where no teacher is asked, and 1, where "
                "no jump is trained; 0.25 is usual"
            )
        self.time_sampler = time_sampler
        self.equal_fraction = equal_fraction
        self.loss = loss

    def objective(self, x0: Tensor, condition: Condition) -> Objective:
        """Sample an interval and where to split it, and regress onto the two parts."""
        interval = sample_interval(self.time_sampler, len(x0), self.equal_fraction, x0.device)
        r, t = interval.r, interval.t
        guided = self.guided_condition(condition, len(x0))
        x_t = self.training_states(x0, torch.randn_like(x0), t, guided)
        target = self.split_target(x_t, r, t, torch.rand_like(t), guided)
        return Objective(self.loss(self.average_velocity(x_t, r, t, guided), target), t)

    @torch.no_grad()
    def split_target(self, x_t: Tensor, r: Tensor, t: Tensor, share: Tensor, condition: GuidedCondition) -> Tensor:
        """What u from t down to r is to be (B, C, h, w): the guided velocity where r = t, else a mean of two u.

        Args:
            x_t: (B, C, h, w).
            r: Ends (B,).
            t: Starts (B,).
            share: Of the interval (B,), in [0, 1], that comes before the split.
            condition: Of the batch.
        """
        target = torch.empty_like(x_t)
        narrow, count = self.rows_where(t <= r)
        if len(narrow):
            target[narrow[:count]] = self.teacher_velocity(x_t[narrow], t[narrow], condition[narrow])[:count]
        wide, count = self.rows_where(t > r)
        if len(wide):
            start, end, split = t[wide], r[wide], torch.lerp(t[wide], r[wide], share[wide])
            first = self.evaluated(x_t[wide], split, start, condition[wide])
            x_s = flow_step(x_t[wide], first, split, start)
            second = self.evaluated(x_s, end, split, condition[wide])
            target[wide[:count]] = torch.lerp(second, first, expand(share[wide], first))[:count]
        return target
