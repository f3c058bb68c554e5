"""Consistency distillation: all states of a teacher's trajectory have the same prediction of x0."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.losses import Loss, PseudoHuberLoss
from lightning_distill.flow.path import flow_step
from lightning_distill.flow.solvers import SOLVERS, evaluations
from lightning_distill.flow.times import TimeSampler, Uniform, move_on_grid
from lightning_distill.methods.base import Objective
from lightning_distill.methods.calls import total_calls
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.methods.trajectory_regression import TrajectoryRegression
from lightning_distill.teachers.model_adapter import Condition


class ConsistencyDistillation(TrajectoryRegression):
    r"""Consistency distillation (consistency models, arXiv 2303.01469, Algorithm 2; latent ones, arXiv 2310.04378).

    .. math:: L = d \big( f(x_t, t), \, \mathrm{sg} \, f(\hat x_r, r) \big), \quad f(x_t, t) = x_t - t \, u(x_t, 0, t),

    where one step of the guided teacher leads from :math:`x_t` to :math:`\hat x_r`. At t = 0, f is the identity. The student is
    evaluated at r = 0 only, and samples by predicting x0 and re-noising (`stochastic_sampling`).

    Args:
        time_sampler: Distribution of t.
        solver: Solver of the teacher's step: "euler", "heun" or "midpoint".
        teacher_step: Length of the teacher's step, in (0, 1], measured on the sampling grid: 1/50 is one of fifty sampling
            steps, like the 20 of 1000 that arXiv 2310.04378 skips.
        target: Network of the target f: "online", the student (arXiv 2310.14189), or "ema", its EMA (arXiv 2303.01469).
        loss: Distance d of the two f, in latents.
        **kwargs: Of `TrajectoryRegression` and `TeacherStudentBase`.

    Raises:
        ConfigurationError: If settings are out of range or contradict each other.
    """

    stochastic_sampling: ClassVar[bool] = True
    learns_velocity: ClassVar[bool] = False

    def __init__(
        self,
        *args: Any,
        time_sampler: TimeSampler = Uniform(),
        solver: str = "heun",
        teacher_step: float = 0.02,
        target: Literal["online", "ema"] = "online",
        loss: Loss = PseudoHuberLoss(),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if solver not in SOLVERS:
            raise ConfigurationError(f"model.solver is {solver!r}; choose one of {', '.join(SOLVERS)}")
        if not 0 < teacher_step <= 1:
            raise ConfigurationError(f"model.teacher_step is {teacher_step}; choose a length in (0, 1], 0.02 is usual")
        if target not in ("online", "ema"):
            raise ConfigurationError(f"model.target is {target!r}; choose online or ema")
        if target == "ema" and self.ema_decay is None:
            raise ConfigurationError("model.target is ema, and model.ema_decay is null; set ema_decay, or target to online")
        self.time_sampler = time_sampler
        self.solver = solver
        self.teacher_step = teacher_step
        self.target = target
        self.loss = loss

    def objective(self, x0: Tensor, condition: Condition) -> Objective:
        """Predict x0 at t and at the end of the teacher's step."""
        t = self.time_sampler(len(x0), x0.device)
        guided = self.networks.guided_condition(condition)
        x_t = self.training_states(x0, torch.randn_like(x0), t, guided)
        f, target = self.consistency(x_t, t, guided)
        return Objective(self.loss(f, target), t)

    def consistency(self, x_t: Tensor, t: Tensor, condition: GuidedCondition) -> tuple[Tensor, Tensor]:
        """The student's f at t and its target, (B, C, h, w) each."""
        r = move_on_grid(t, self.teacher_step, self.networks.grid_shift(x_t))
        x_r = self.networks.integrate_teacher(x_t, r, t, 1, condition, self.solver)
        end = torch.zeros_like(t)
        network = self.student if self.target == "online" else self.networks.sampling_student
        target = self.networks.student_step(x_r, end, r, condition, network)
        return flow_step(x_t, self.networks.average_velocity(x_t, end, t, condition), end, t), target

    def expected_calls(self, phase: str) -> dict[str, float]:
        """The student's f and its target, the teacher's step, and the calls of trajectories.

        A target of the EMA counts as a student call, because it gathers as many weights.
        """
        student = {"student": 2, "student_backward": 1}
        return total_calls(student, self.networks.teacher_calls(evaluations(self.solver, 1)), self.trajectory_calls())
