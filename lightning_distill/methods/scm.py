"""Continuous-time consistency distillation."""

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import expand
from lightning_distill.flow.times import LogitNormal, TimeSampler
from lightning_distill.flow.trigflow import (
    consistency_tangent,
    linear_state,
    linear_time,
    trig_state,
    trig_time,
    trig_velocity,
)
from lightning_distill.methods.auxiliary import AuxiliaryLoss, AuxiliaryTraining
from lightning_distill.methods.base import Objective, ObjectiveSteps
from lightning_distill.methods.calls import total_calls
from lightning_distill.methods.derivative_check import check_derivative, report_derivative
from lightning_distill.methods.networks import DerivativeKind, StudentDerivative
from lightning_distill.methods.trajectory_regression import TrajectoryRegression
from lightning_distill.teachers.model_adapter import Condition


class TimeWeight(nn.Module):
    """Learned logarithm of the error's size at each time (EDM2, arXiv 2312.02696, section 5; sCM, arXiv 2410.11081, Eq. 8).

    It starts at 0, equal weights for all times. Features of t are cosines and sines of one to `features` half turns.

    Args:
        features: Number of pairs of features.
    """

    def __init__(self, features: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.arange(1, features + 1), persistent=False)
        self.linear = nn.Linear(2 * features, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        """The logarithm (B,) for t (B,) in [0, 1]."""
        angles = t[:, None].float() * self.get_buffer("frequencies")
        weights: Tensor = self.linear(torch.cat([angles.cos(), angles.sin()], -1))
        return weights[:, 0]


class SCM(TrajectoryRegression):
    r"""Continuous-time consistency distillation (sCM, arXiv 2410.11081), of flow-matching teachers (2503.09641, 2512.13006).

    A consistency model :math:`f(y_s) = \cos(s) y_s - \sin(s) F(y_s, s)` predicts the same x0 along a trajectory. F is
    `flow.trigflow.trig_velocity` of the student's average velocity down to 0, so that :math:`f = x_t - t \, u(x_t, 0, t)`. The
    change along the teacher's trajectory, normalised,

    .. math:: g = -\cos^2(s) (F - F_T) - \rho \cos(s) \sin(s) \, (y_s + \dot F), \quad g \leftarrow g / (\|g\| + 0.1),

    is the negative gradient of the loss in F (arXiv 2410.11081, Eq. 8):

    .. math:: L = e^{-l(s)} \, \mathrm{mean} (F - \mathrm{sg} F - g)^2 + l(s).

    The paper adds the logarithm of a factor :math:`1 / \tan s` to l, with the same optimum. Learned from 0, such an l spends
    the first hundreds of steps on the smallest s. There the factor is large, and F hardly matters.

    Args:
        time_sampler: Distribution of t. A normal variable z of :math:`s = \arctan e^z` is `LogitNormal` in t; the default is
            that of arXiv 2512.13006.
        derivative: "exact", by dual numbers, or "finite_difference". The latter costs two more forward passes, and suits
            students with an operation without a forward-mode rule.
        tangent_warmup_steps: Optimizer steps over which rho rises from 0 to 1.
        tangent_norm: Norm of g: "rms" is the same for latents of all sizes (arXiv 2503.09641); "l2" is the paper's.
        time_weight: Whether l, the logarithm of the error's size by time, is learned; otherwise it is the logarithm of tan s,
            which gives the paper's factor.
        time_weight_lr: Learning rate of l, above 0.
        **kwargs: Of `TrajectoryRegression` and `TeacherStudentBase`.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    stochastic_sampling: ClassVar[bool] = True
    learns_velocity: ClassVar[bool] = False

    def __init__(
        self,
        *args: Any,
        time_sampler: TimeSampler = LogitNormal(mean=0.2, std=1.6),
        derivative: DerivativeKind = "exact",
        tangent_warmup_steps: int = 10_000,
        tangent_norm: Literal["rms", "l2"] = "rms",
        time_weight: bool = True,
        time_weight_lr: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if tangent_warmup_steps < 0:
            raise ConfigurationError(
                f"model.tangent_warmup_steps is {tangent_warmup_steps}; set it to 0 for no warm-up, or above"
            )
        if tangent_norm not in ("rms", "l2"):
            raise ConfigurationError(f"model.tangent_norm is {tangent_norm!r}; choose rms or l2")
        if not time_weight_lr > 0:
            raise ConfigurationError(f"model.time_weight_lr is {time_weight_lr}; set it above 0, 0.001 is usual")
        self.derivative = StudentDerivative(derivative, self.adapter, self.student_options)
        self.time_sampler = time_sampler
        self.tangent_warmup_steps = tangent_warmup_steps
        self.tangent_norm = tangent_norm
        self.time_weight = TimeWeight() if time_weight else None
        if self.time_weight is not None:
            self.auxiliary.add("time_weight", AuxiliaryTraining(time_weight_lr, betas=(0.9, 0.99)))

    @property
    def tangent_weight(self) -> float:
        """Rho, in [0, 1]."""
        return min(1.0, self.global_step / self.tangent_warmup_steps) if self.tangent_warmup_steps else 1.0

    def objective(self, x0: Tensor, condition: Condition) -> Objective | ObjectiveSteps:
        """Regress F onto its value moved by the tangent g along the teacher's trajectory."""
        t = self.time_sampler(len(x0), x0.device)
        guided = self.networks.guided_condition(condition)
        x_t = self.training_states(x0, torch.randn_like(x0), t, guided)
        s = trig_time(t)
        y_s, velocity = trig_state(x_t, s), trig_velocity(self.networks.teacher_velocity(x_t, t, guided), x_t, s)

        def network(y: Tensor, end: Tensor, s: Tensor) -> Tensor:
            x = linear_state(y, s)
            return trig_velocity(self.networks.average_velocity(x, end, linear_time(s), guided), x, s)

        f, dfds = self.derivative.value_and_derivative(network, y_s, torch.zeros_like(s), s, velocity)
        with torch.no_grad():
            g = consistency_tangent(f, velocity, y_s, dfds, s, self.tangent_weight)
            norm = g.flatten(1).norm(dim=1)
            size = norm / math.sqrt(g[0].numel()) if self.tangent_norm == "rms" else norm
            target = f + g / expand(size + 0.1, g)
        error = (f - target).square().flatten(1).mean(1)
        logs = {"tangent_norm": size.mean(), "tangent_weight": torch.tensor(self.tangent_weight)}
        if self.time_weight is None:
            # 1 / tan(s), which float32 rounds to a negative number at the end
            return Objective((1 - t) / t.clamp_min(1e-4) * error, t, logs)
        return self._weighted(self.time_weight, error, t, logs)

    def _weighted(self, time_weight: TimeWeight, error: Tensor, t: Tensor, logs: dict[str, Tensor]) -> ObjectiveSteps:
        """The error (B,), weighted by the learned weight, which trains on the same errors."""
        # Autocast would round the logarithm to 16 bits, and the weight with it.
        with torch.autocast(t.device.type, enabled=False):
            logarithm = time_weight(t)
            loss = (error.detach() * torch.exp(-logarithm) + logarithm).mean()
        weighted = error * torch.exp(-logarithm.detach())
        yield AuxiliaryLoss("time_weight", loss)
        return Objective(weighted, t, logs)

    # Networks and planner

    def build_networks(self) -> None:
        """Build teacher and student; shard the time weight like them, because ZeRO-3 trains only sharded modules."""
        super().build_networks()
        if self.time_weight is not None and self.sharding is not None:
            self.sharding.shard(self.time_weight)

    def on_fit_start(self) -> None:
        """Check the student's derivative before the first step."""
        super().on_fit_start()
        context = self.trainer.precision_plugin.forward_context
        place = self.evaluator.latent_shape, self.device
        resumes = self.trainer.ckpt_path is not None
        report = check_derivative(self.derivative, self.networks, *place, context, resumes)
        report_derivative(report, self.loggers)

    def expected_calls(self, phase: str) -> dict[str, float]:
        """One guided velocity, the student's derivative, and the calls of trajectories."""
        passes = 1 if self.derivative.kind == "exact" else 3
        student = {"student": passes, "student_backward": 1}
        return total_calls(student, self.networks.teacher_calls(), self.trajectory_calls())
