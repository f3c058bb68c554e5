"""MeanFlow distillation: discrete solution first, then the differential one."""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.derivative import AverageVelocityFn
from lightning_distill.flow.losses import Loss, PowerLoss
from lightning_distill.flow.path import expand
from lightning_distill.flow.solvers import SOLVERS
from lightning_distill.flow.times import LogitNormal, TimeSampler, move_on_grid, sample_interval
from lightning_distill.methods.alignment import TrajectoryAlignment
from lightning_distill.methods.auxiliary import AuxiliaryTraining
from lightning_distill.methods.base import Objective
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.methods.student_derivative import Derivative, StudentDerivative
from lightning_distill.methods.trajectory_regression import TrajectoryStates
from lightning_distill.sharding.shared_weights import check_sharing
from lightning_distill.teachers.model_adapter import Condition

Solution = Literal["discrete", "bootstrapped", "differential"]
PHASES: dict[str, int] = {"discrete": 0, "bootstrapped": 1, "differential": 2}
"""Values of the curve `train/phase`."""


class MeanFlow(StudentDerivative, TrajectoryStates):
    r"""Distillation of a teacher's flow into average velocities (MeanFlow, arXiv 2505.13447; 2512.13006; 2605.17834).

    The student regresses :math:`\| u(x_t, r, t) - u^* \|` onto one of three targets, with :math:`\tilde v` the guided teacher:

    - discrete: the teacher integrated in sub-steps, :math:`u^* = (x_t - x_r) / (t - r)`. No student is in the target.
    - bootstrapped: one teacher step of a set length to s, then the student's own jump to
      :math:`x_r = x_s - (s - r) \, \mathrm{sg} \, u(x_s, r, s)`, and again :math:`u^* = (x_t - x_r) / (t - r)`.
    - differential: the MeanFlow identity (arXiv 2505.13447, Eq. 6),
      :math:`u^* = \mathrm{sg}[\tilde v - \lambda (t - r) \, du/dt]`, with an exact derivative.

    `callbacks.SwitchSolution` changes `solution` during training. Of arXiv 2605.17834 only the abstract is public: the
    discrete solution, the switch and the alignment are this project's reading of it.

    Args:
        solution: The target that training starts with.
        time_sampler: Distribution of the two times of an interval.
        equal_fraction: Share of samples with r = t, in [0, 1].
        solver: Of the teacher's steps in the discrete and the bootstrapped solution: "euler", "heun" or "midpoint".
        solver_steps: Sub-steps of the discrete solution over an interval, even on the sampling grid.
        bootstrap_step: Length of the teacher's step in the bootstrapped solution, in (0, 1], measured on the sampling grid:
            1/8 is one of eight sampling steps.
        derivative: Of the differential solution: "exact", by dual numbers, or "finite_difference", for a student with an
            operation that has no forward-mode rule, at the cost of two more forward passes.
        tangent_warmup_steps: Optimizer steps over which lambda rises from 0 to 1, from the first differential one.
        loss: Of the regression.
        alignment: Trajectory distribution alignment as an auxiliary loss, or None.
        **kwargs: Of `TrajectoryStates` and `TeacherStudentBase`.

    Raises:
        ConfigurationError: If settings are out of range or contradict each other.
    """

    def __init__(
        self,
        *args: Any,
        solution: Solution = "discrete",
        time_sampler: TimeSampler = LogitNormal(),
        equal_fraction: float = 0.25,
        solver: str = "euler",
        solver_steps: int = 4,
        bootstrap_step: float = 0.125,
        derivative: Derivative = "exact",
        tangent_warmup_steps: int = 0,
        loss: Loss = PowerLoss(),
        alignment: TrajectoryAlignment | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= equal_fraction <= 1:
            raise ConfigurationError(f"model.equal_fraction is {equal_fraction}; choose a share in [0, 1], 0.25 is usual")
        if equal_fraction == 0 and self.guidance.kind == "improved":
            raise ConfigurationError(
                "guidance.kind improved mixes in the student at r = t, which model.equal_fraction 0 never trains; set it to "
                "0.25"
            )
        if solver not in SOLVERS:
            raise ConfigurationError(f"model.solver is {solver!r}; choose one of {', '.join(SOLVERS)}")
        if solver_steps < 1:
            raise ConfigurationError(f"model.solver_steps is {solver_steps}; take at least 1")
        if not 0 < bootstrap_step <= 1:
            raise ConfigurationError(f"model.bootstrap_step is {bootstrap_step}; choose a length in (0, 1], 0.125 is usual")
        self.choose_derivative(derivative)
        if tangent_warmup_steps < 0:
            raise ConfigurationError(f"model.tangent_warmup_steps is {tangent_warmup_steps}; 0 is no warm-up")
        self.time_sampler = time_sampler
        self.equal_fraction = equal_fraction
        self.solver = solver
        self.solver_steps = solver_steps
        self.bootstrap_step = bootstrap_step
        self.tangent_warmup_steps = tangent_warmup_steps
        self.loss = loss
        self.alignment = alignment
        self._solution: Solution = solution
        self._differential_since: int | None = 0 if solution == "differential" else None
        self.solution = solution

    # The phase

    @property
    def solution(self) -> Solution:
        """The target in use."""
        return self._solution

    @solution.setter
    def solution(self, solution: Solution) -> None:
        if solution not in PHASES:
            raise ConfigurationError(f"model.solution is {solution!r}; choose one of {', '.join(PHASES)}")
        if solution == "differential" and self._solution != "differential":
            self._differential_since = self.global_step
        self._solution = solution

    @property
    def tangent_weight(self) -> float:
        """Lambda of the differential target, in [0, 1]."""
        since = self._differential_since or 0
        if self.tangent_warmup_steps == 0:
            return 1.0
        return min(1.0, (self.global_step - since) / self.tangent_warmup_steps)

    # The objective

    def objective(self, x0: Tensor, condition: Condition) -> Objective:
        """Sample (r, t), ask the teacher, form the target, weigh the loss."""
        interval = sample_interval(self.time_sampler, len(x0), self.equal_fraction, x0.device)
        r, t = interval.r, interval.t
        noise = torch.randn_like(x0)
        guided = self.guided_condition(condition, len(x0))
        x_t = self.training_states(x0, noise, t, guided)
        u, target, logs = self.regression(x_t, r, t, guided)
        loss = self.loss(u, target)
        logs |= {"u_norm": rms(u.detach()), "phase": torch.tensor(float(PHASES[self.solution]))}
        if self.alignment is not None and self.alignment.active(self.global_step):
            aligned, alignment_logs = self.alignment(self, noise, guided)
            loss = loss + aligned
            logs |= alignment_logs
        return Objective(loss, t, logs)

    def regression(
        self, x_t: Tensor, r: Tensor, t: Tensor, condition: GuidedCondition
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The student's u, its target u* in the present solution, (B, C, h, w) each, and scalars to log.

        Where r = t, the target is the guided velocity in every solution, and costs no integration and no derivative.
        """
        if self.solution == "differential":
            return self._differential(x_t, r, t, condition)
        target = self._integrated(x_t, r, t, condition)
        return self.average_velocity(x_t, r, t, condition), target, {}

    @torch.no_grad()
    def _integrated(self, x_t: Tensor, r: Tensor, t: Tensor, condition: GuidedCondition) -> Tensor:
        target = torch.empty_like(x_t)
        narrow, count = self.rows_where(t <= r)
        if len(narrow):
            target[narrow[:count]] = self.teacher_velocity(x_t[narrow], t[narrow], condition[narrow])[:count]
        wide, count = self.rows_where(t > r)
        if len(wide):
            solve = self._discrete if self.solution == "discrete" else self._bootstrapped
            target[wide[:count]] = solve(x_t[wide], r[wide], t[wide], condition[wide])[:count]
        return target

    def _differential(
        self, x_t: Tensor, r: Tensor, t: Tensor, condition: GuidedCondition
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        v = self.teacher_velocity(x_t, t, condition)

        def network(rows: Tensor) -> AverageVelocityFn:
            known = condition[rows]
            return lambda x, r, t: self.average_velocity(x, r, t, known)

        (narrow, narrow_count), (wide, wide_count) = self.rows_where(t <= r), self.rows_where(t > r)
        target, u, logs = v.clone(), [], {}
        if len(narrow):
            u.append(network(narrow)(x_t[narrow], r[narrow], t[narrow]))
        if len(wide):
            point = x_t[wide], r[wide], t[wide]
            value, dudt = self.value_and_derivative(network(wide), *point, v[wide])
            u.append(value)
            counted = wide[:wide_count]
            target[counted] -= self.tangent_weight * expand(t - r, v)[counted] * dudt[:wide_count]
            logs["dudt_norm"] = rms(dudt)
        if narrow_count < len(narrow):  # computed along, for the other processes' sake; so must be its backward pass
            u = [u[1] + 0 * u[0].sum()]
            narrow = narrow[:0]
        elif wide_count < len(wide):
            u = [u[0] + 0 * u[1].sum()]
            wide = wide[:0]
        order = torch.cat([narrow, wide]).argsort()
        return torch.cat(u)[order], target, logs

    def _discrete(self, x_t: Tensor, r: Tensor, t: Tensor, condition: GuidedCondition) -> Tensor:
        x_r = self.integrate_teacher(x_t, r, t, self.solver_steps, condition, self.solver)
        return (x_t - x_r) / expand(t - r, x_t)

    def _bootstrapped(self, x_t: Tensor, r: Tensor, t: Tensor, condition: GuidedCondition) -> Tensor:
        s = torch.maximum(move_on_grid(t, self.bootstrap_step, self.grid_shift(x_t)), r)
        x_s = self.integrate_teacher(x_t, s, t, 1, condition, self.solver)
        return (x_t - self.student_step(x_s, r, s, condition)) / expand(t - r, x_t)

    # Networks and checkpoints

    def setup(self, stage: str) -> None:
        """Refuse settings that cannot work, the critic's among them."""
        super().setup(stage)
        if self.alignment is not None:
            self.check_student(self.alignment.critic_options(self.student_options))

    def on_fit_start(self) -> None:
        """As in every method that takes derivatives; the critic's base must be the teacher's as well."""
        super().on_fit_start()
        if self.alignment is not None and self.alignment.critic_options(self.student_options).lora is not None:
            check_sharing(self.alignment.critic, self.teacher)

    @property
    def takes_derivatives(self) -> bool:
        """Whether the differential solution is the target, or what a callback may switch to."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]  # set by a helper of Trainer's constructor
        return "differential" in (self.solution, *(getattr(callback, "to", None) for callback in callbacks))

    def build_networks(self) -> None:
        """Teacher and student, and the critic of the alignment."""
        super().build_networks()
        if self.alignment is not None:
            self.alignment.build(self.adapter, self.teacher, self.student_options)

    def auxiliary_trainings(self) -> dict[str, AuxiliaryTraining]:
        """The critic's."""
        return {} if self.alignment is None else {"alignment.critic": self.alignment.critic_training}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the phase, so that a resumed run continues in it."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["meanflow"] = {"solution": self._solution, "differential_since": self._differential_since}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue in the phase that was saved."""
        super().on_load_checkpoint(checkpoint)
        self._solution = checkpoint["meanflow"]["solution"]
        self._differential_since = checkpoint["meanflow"]["differential_since"]


def rms(x: Tensor) -> Tensor:
    """Root mean square of all entries."""
    return x.square().mean().sqrt()
