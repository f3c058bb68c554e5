"""Consistency distillation: all states of a teacher's trajectory go to the same picture."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.losses import Loss, PseudoHuberLoss
from lightning_distill.flow.path import flow_step
from lightning_distill.flow.solvers import SOLVERS
from lightning_distill.flow.times import TimeSampler, Uniform, move_on_grid
from lightning_distill.methods.base import Objective
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.methods.trajectory_regression import TrajectoryStates
from lightning_distill.teachers.model_adapter import Condition


class ConsistencyDistillation(TrajectoryStates):
    r"""Consistency distillation (consistency models, arXiv 2303.01469, Algorithm 2; latent ones, arXiv 2310.04378).

    .. math:: L = d \big( f(x_t, t), \, \mathrm{sg} \, f(\hat x_r, r) \big), \quad f(x_t, t) = x_t - t \, u(x_t, 0, t),

    where one step of the guided teacher leads from :math:`x_t` to :math:`\hat x_r`. There is nothing to learn at t = 0, where f
    is x itself. The student is asked for r = 0 only, so that it samples by jumps to data and fresh noise.

    Args:
        time_sampler: Distribution of t.
        solver: Of the teacher's step: "euler", "heun" or "midpoint".
        teacher_step: Its length, in (0, 1], measured on the sampling grid: 1/50 is one of fifty sampling steps, as the 20 of
            1000 that arXiv 2310.04378 skips.
        target: Whose f is the target: "online", the student's own (arXiv 2310.14189), or "ema", that of its average (arXiv
            2303.01469).
        loss: The distance d of the two f, in latents.
        **kwargs: Of `TrajectoryStates` and `TeacherStudentBase`.

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
            raise ConfigurationError("model.target is ema, and model.ema_decay is null; set ema_decay, or online")
        self.time_sampler = time_sampler
        self.solver = solver
        self.teacher_step = teacher_step
        self.target = target
        self.loss = loss

    def objective(self, x0: Tensor, condition: Condition) -> Objective:
        """Go to data from t, and from where the teacher's step ends."""
        t = self.time_sampler(len(x0), x0.device)
        guided = self.guided_condition(condition, len(x0))
        x_t = self.training_states(x0, torch.randn_like(x0), t, guided)
        f, target = self.consistency(x_t, t, guided)
        return Objective(self.loss(f, target), t)

    def consistency(self, x_t: Tensor, t: Tensor, condition: GuidedCondition) -> tuple[Tensor, Tensor]:
        """Where the student goes from t, and its target, (B, C, h, w) each."""
        r = move_on_grid(t, self.teacher_step, self.grid_shift(x_t))
        x_r = self.integrate_teacher(x_t, r, t, 1, condition, self.solver)
        end = torch.zeros_like(t)
        network = self.student if self.target == "online" else self.sampling_student
        target = self.student_step(x_r, end, r, condition, network)
        return flow_step(x_t, self.average_velocity(x_t, end, t, condition), end, t), target
