"""Inductive moment matching: flow maps from t and from a cleaner r agree in distribution."""

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.moment_matching import Kernel, LaplaceKernel, constant_decrement, discrepancy, time_weight
from lightning_distill.flow.path import flow_step, interpolate
from lightning_distill.flow.solvers import SOLVERS, evaluations
from lightning_distill.flow.times import TimeSampler, Uniform
from lightning_distill.methods.base import Objective
from lightning_distill.methods.calls import total_calls
from lightning_distill.methods.trajectory_regression import TrajectoryRegression
from lightning_distill.teachers.model_adapter import Condition


class IMM(TrajectoryRegression):
    r"""Inductive moment matching (IMM, arXiv 2503.07565), as a distillation.

    For s < r < t, the flow maps to s from t and from r are trained to agree in distribution:

    .. math:: L = w(t) \, \frac{1}{M^2} \sum_{i, j} k(y_i, y_j) + k(z_i, z_j) - 2 k(y_i, z_j), \quad
        y = x_t - (t - s) \, u(x_t, s, t), \quad z = \mathrm{sg} [ x_r - (r - s) \, u(x_r, s, r) ],

    over groups of M particles. They are consecutive samples of a batch with images, captions and noise of their own, and share
    (s, r, t). The kernel scales distances by t - s, the length of the step. r is a constant step below t in
    :math:`\eta = t / (1 - t)`.

    Time 1, where sampling starts, has no eta. The paper ends at eta 160, which is t = 0.994, and starts sampling there. Here t
    ends at 1, with the r of eta 160. The smallest eta is 0 in both.

    Args:
        time_sampler: Distribution of t; s is uniform below it.
        particles: Number M of samples of a group; the batch size must be a multiple.
        kernel: Kernel k.
        bridge: Step from x_t to x_r: "teacher", by one step of the guided teacher, or "data", by the DDIM interpolant of x0 and
            x_t. The latter is x0 with the same noise at r, as in the paper. With "data" the teacher is not evaluated, and the
            student learns the images without guidance.
        solver: Solver of the teacher's step: "euler", "heun" or "midpoint".
        decrement_exponent: Exponent of the step in eta, `eta_max / 2^decrement_exponent`, 1 to 16; beyond, r equals t in
            float32.
        eta_max: Largest eta that a step starts from, above 0.
        weight_power: a of w(t), at least 1; 2 reduces the weight of large t.
        weight_bias: b of w(t); larger values raise the weight of small t.
        **kwargs: Of `TrajectoryRegression` and `TeacherStudentBase`.

    Raises:
        ConfigurationError: If settings are out of range or contradict each other.
    """

    learns_velocity: ClassVar[bool] = False

    def __init__(
        self,
        *args: Any,
        time_sampler: TimeSampler = Uniform(),
        particles: int = 4,
        kernel: Kernel = LaplaceKernel(),
        bridge: Literal["teacher", "data"] = "teacher",
        solver: str = "euler",
        decrement_exponent: int = 12,
        eta_max: float = 160.0,
        weight_power: float = 1.0,
        weight_bias: float = 5.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if particles < 1:
            raise ConfigurationError(f"model.particles is {particles}; set it to at least 1, 4 is usual")
        if bridge not in ("teacher", "data"):
            raise ConfigurationError(f"model.bridge is {bridge!r}; choose teacher or data")
        if bridge == "data" and self.guidance.kind == "two_branch" and self.guidance.scale != 1:
            raise ConfigurationError(
                f"model.bridge is data, which trains without guidance, and guidance.scale is {self.guidance.scale}; set "
                "guidance.scale to 1, or bridge to teacher"
            )
        if bridge == "data" and self.trajectory_fraction > 0:
            raise ConfigurationError(
                f"model.bridge is data, which trains on noised data alone, and model.trajectory_fraction is "
                f"{self.trajectory_fraction}; set trajectory_fraction to 0, or bridge to teacher"
            )
        if solver not in SOLVERS:
            raise ConfigurationError(f"model.solver is {solver!r}; choose one of {', '.join(SOLVERS)}")
        if not 1 <= decrement_exponent <= 16:
            raise ConfigurationError(f"model.decrement_exponent is {decrement_exponent}; choose 1 to 16, 12 is usual")
        if not eta_max > 0:
            raise ConfigurationError(f"model.eta_max is {eta_max}; set it above 0, 160 is usual")
        if not weight_power >= 1:
            raise ConfigurationError(
                f"model.weight_power is {weight_power}; set it to at least 1, below which w(t) is infinite at t = 1"
            )
        if not math.isfinite(weight_bias):
            raise ConfigurationError(f"model.weight_bias is {weight_bias}; set it to a finite number, 5 is usual")
        self.time_sampler = time_sampler
        self.particles = particles
        self.kernel = kernel
        self.bridge = bridge
        self.solver = solver
        self.decrement_exponent = decrement_exponent
        self.eta_max = eta_max
        self.weight_power = weight_power
        self.weight_bias = weight_bias

    def setup(self, stage: str) -> None:
        """Check the settings, and that a batch divides into groups."""
        super().setup(stage)
        size = getattr(getattr(self._trainer, "datamodule", None), "batch_size", None)
        if stage == "fit" and isinstance(size, int) and size % self.particles:
            raise ConfigurationError(
                f"data.batch_size is {size}, which does not divide into groups of model.particles {self.particles}; choose a "
                "multiple"
            )

    def objective(self, x0: Tensor, condition: Condition) -> Objective:
        """Sample (s, r, t) for each group, and compare its flow maps to s."""
        if missing := -len(x0) % self.particles:  # data may leave broken images out of a batch
            rows = torch.arange(len(x0) + missing, device=x0.device) % len(x0)
            x0, condition = x0[rows], {name: value[rows] for name, value in condition.items()}
        t = self.time_sampler(len(x0) // self.particles, x0.device)
        s = t * torch.rand_like(t)
        r = constant_decrement(t, s, self.eta_max / 2**self.decrement_exponent, self.eta_max)
        guided = self.networks.guided_condition(condition)

        start, middle, end = (time.repeat_interleave(self.particles) for time in (t, r, s))
        noise = torch.randn_like(x0)
        x_t = self.training_states(x0, noise, start, guided)
        if self.bridge == "teacher":
            x_r = self.networks.integrate_teacher(x_t, middle, start, 1, guided, self.solver)
        else:
            x_r = interpolate(x0, noise, middle)
        y = flow_step(x_t, self.networks.average_velocity(x_t, end, start, guided), end, start)
        z = self.networks.student_step(x_r, end, middle, guided)
        loss = self.compare(y, z, s, t).repeat_interleave(self.particles)
        return Objective(loss, start)

    def compare(self, y: Tensor, z: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Weighted discrepancy of groups (G,) between particles at s from t and particles at s from r.

        Args:
            y: States at s from t (G M, C, h, w).
            z: States at s from r (G M, C, h, w).
            s: Ends (G,).
            t: Starts (G,).
        """
        y, z = (x.float().reshape(len(t), self.particles, -1) for x in (y, z))
        return time_weight(t, self.weight_power, self.weight_bias) * discrepancy(y, z, self.kernel, t - s)

    def expected_calls(self, phase: str) -> dict[str, float]:
        """Both flow maps of the student, the teacher's step, and the calls of trajectories."""
        bridge = self.networks.teacher_calls(evaluations(self.solver, 1)) if self.bridge == "teacher" else {}
        return total_calls({"student": 2, "student_backward": 1}, bridge, self.trajectory_calls())
