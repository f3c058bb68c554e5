"""MeanFlow distillation: the discrete solution first, then the differential one."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.derivative import AverageVelocityFn
from lightning_distill.flow.losses import Loss, PowerLoss
from lightning_distill.flow.path import expand
from lightning_distill.flow.solvers import SOLVERS, evaluations
from lightning_distill.flow.times import LogitNormal, TimeSampler, move_on_grid, sample_interval
from lightning_distill.methods.alignment import TrajectoryAlignment
from lightning_distill.methods.base import Objective, ObjectiveSteps
from lightning_distill.methods.calls import total_calls
from lightning_distill.methods.derivative_check import check_derivative, report_derivative
from lightning_distill.methods.networks import DerivativeKind, GuidedCondition, StudentDerivative
from lightning_distill.methods.trajectory_regression import TrajectoryRegression
from lightning_distill.teachers.model_adapter import Condition
from lightning_distill.teachers.student_options import StudentOptions

Solution = Literal["discrete", "bootstrapped", "differential"]


class MeanFlow(TrajectoryRegression):
    r"""Distillation of a teacher's flow into average velocities (MeanFlow, arXiv 2505.13447; 2512.13006; 2605.17834).

    The student regresses :math:`\| u(x_t, r, t) - u^* \|` onto one of three targets, with :math:`\tilde v` the guided teacher:

    - discrete: the teacher is integrated in sub-steps, :math:`u^* = (x_t - x_r) / (t - r)`. The target contains no student.
    - bootstrapped: one teacher step of a set length to s, then the student's own step to
      :math:`x_r = x_s - (s - r) \, \mathrm{sg} \, u(x_s, r, s)`, and again :math:`u^* = (x_t - x_r) / (t - r)`.
    - differential: the MeanFlow identity (arXiv 2505.13447, Eq. 6),
      :math:`u^* = \mathrm{sg}[\tilde v - \lambda (t - r) \, du/dt]`, with an exact derivative.

    `callbacks.SwitchSolution` changes `solution` during training. Only the abstract of arXiv 2605.17834 is public: the discrete
    solution, the switch and the alignment are this project's reading of it.

    Args:
        solution: Target at the start of training.
        time_sampler: Distribution of the two times of an interval.
        equal_fraction: Share of samples with r = t, in [0, 1].
        solver: Solver of the teacher's steps in the discrete and the bootstrapped solution: "euler", "heun" or "midpoint".
        solver_steps: Sub-steps of the discrete solution over an interval, at least 1, even on the sampling grid.
        bootstrap_step: Length of the teacher's step in the bootstrapped solution, in (0, 1], measured on the sampling grid:
            1/8 is one of eight sampling steps.
        derivative: Derivative of the differential solution: "exact", by dual numbers, or "finite_difference". The latter costs
            two more forward passes, and suits students with an operation without a forward-mode rule.
        tangent_warmup_steps: Optimizer steps over which lambda rises from 0 to 1, counted from the first differential one.
        loss: Loss of the regression.
        alignment: Trajectory distribution alignment as an auxiliary loss, or None.
        **kwargs: Of `TrajectoryRegression` and `TeacherStudentBase`.

    Raises:
        ConfigurationError: If settings are out of range or contradict each other.
    """

    phases: ClassVar[tuple[str, ...]] = ("discrete", "bootstrapped", "differential")

    def __init__(
        self,
        *args: Any,
        solution: Solution = "discrete",
        time_sampler: TimeSampler = LogitNormal(),
        equal_fraction: float = 0.25,
        solver: str = "euler",
        solver_steps: int = 4,
        bootstrap_step: float = 0.125,
        derivative: DerivativeKind = "exact",
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
                "guidance.kind is improved, which evaluates the student at r = t, and model.equal_fraction 0 never trains it "
                "there; set equal_fraction to 0.25"
            )
        if solver not in SOLVERS:
            raise ConfigurationError(f"model.solver is {solver!r}; choose one of {', '.join(SOLVERS)}")
        if solver_steps < 1:
            raise ConfigurationError(f"model.solver_steps is {solver_steps}; set it to at least 1")
        if not 0 < bootstrap_step <= 1:
            raise ConfigurationError(f"model.bootstrap_step is {bootstrap_step}; choose a length in (0, 1], 0.125 is usual")
        if tangent_warmup_steps < 0:
            raise ConfigurationError(
                f"model.tangent_warmup_steps is {tangent_warmup_steps}; set it to 0 for no warm-up, or above"
            )
        if solution not in self.phases:
            raise ConfigurationError(f"model.solution is {solution!r}; choose one of {', '.join(self.phases)}")
        self.time_sampler = time_sampler
        self.equal_fraction = equal_fraction
        self.solver = solver
        self.solver_steps = solver_steps
        self.bootstrap_step = bootstrap_step
        self.derivative = StudentDerivative(derivative, self.adapter, self.student_options)
        self.tangent_warmup_steps = tangent_warmup_steps
        self.loss = loss
        self.alignment = alignment
        if alignment is not None:
            self.auxiliary.add("alignment.critic", alignment.training_of_critic)
        self._solution: str = solution
        self._configured = solution
        self._differential_since: int | None = 0 if solution == "differential" else None
        self._expected_phases: set[str] = {solution}

    # Phases

    @property
    def solution(self) -> str:
        """The current solution, which is the phase."""
        return self._solution

    @solution.setter
    def solution(self, solution: str) -> None:
        self.phase = solution

    @property
    def phase(self) -> str:
        """The current solution."""
        return self._solution

    @phase.setter
    def phase(self, phase: str) -> None:
        if phase not in self.phases:
            raise ConfigurationError(f"model.solution is {phase!r}; choose one of {', '.join(self.phases)}")
        if phase == "differential" and self._solution != "differential":
            self._differential_since = self.global_step
        self._solution = phase

    def expect_phase(self, phase: str) -> None:
        """Check the student's derivative before training if the differential solution may come."""
        self._expected_phases.add(phase)

    @property
    def tangent_weight(self) -> float:
        """Lambda of the differential target, in [0, 1]."""
        since = self._differential_since or 0
        if self.tangent_warmup_steps == 0:
            return 1.0
        return min(1.0, (self.global_step - since) / self.tangent_warmup_steps)

    # Objective

    def objective(self, x0: Tensor, condition: Condition) -> Objective | ObjectiveSteps:
        """Sample (r, t) and training states, regress u onto its target, and align from `alignment.start_step` on."""
        interval = sample_interval(self.time_sampler, len(x0), self.equal_fraction, x0.device)
        r, t = interval.r, interval.t
        noise = torch.randn_like(x0)
        guided = self.networks.guided_condition(condition)
        x_t = self.training_states(x0, noise, t, guided)
        u, target, logs = self.regression(x_t, r, t, guided)
        phase = torch.tensor(float(self.phases.index(self.solution)))
        objective = Objective(self.loss(u, target), t, logs | {"u_norm": rms(u.detach()), "phase": phase})
        if self.alignment is None or not self.alignment.active(self.global_step):
            return objective
        return self._aligned(self.alignment, objective, noise, guided)

    def _aligned(
        self, alignment: TrajectoryAlignment, regression: Objective, noise: Tensor, condition: GuidedCondition
    ) -> ObjectiveSteps:
        loss, logs = yield from alignment.losses(self.networks, noise, condition, self.global_step)
        return Objective(regression.loss + loss, regression.t, regression.logs | logs)

    def regression(
        self, x_t: Tensor, r: Tensor, t: Tensor, condition: GuidedCondition
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The student's u, its target u* in the current solution, (B, C, h, w) each, and scalars to log.

        Where r = t, the target is the guided velocity in every solution, without integration or derivative.
        """
        if self.solution == "differential":
            return self._differential(x_t, r, t, condition)
        target = self._integrated(x_t, r, t, condition)
        return self.networks.average_velocity(x_t, r, t, condition), target, {}

    @torch.no_grad()
    def _integrated(self, x_t: Tensor, r: Tensor, t: Tensor, condition: GuidedCondition) -> Tensor:
        networks, target = self.networks, torch.empty_like(x_t)
        equal, count = networks.rows_where(t <= r)
        if len(equal):
            target[equal[:count]] = networks.teacher_velocity(x_t[equal], t[equal], condition[equal])[:count]
        wide, count = networks.rows_where(t > r)
        if len(wide):
            solve = self._discrete if self.solution == "discrete" else self._bootstrapped
            target[wide[:count]] = solve(x_t[wide], r[wide], t[wide], condition[wide])[:count]
        return target

    def _discrete(self, x_t: Tensor, r: Tensor, t: Tensor, condition: GuidedCondition) -> Tensor:
        x_r = self.networks.integrate_teacher(x_t, r, t, self.solver_steps, condition, self.solver)
        return (x_t - x_r) / expand(t - r, x_t)

    def _bootstrapped(self, x_t: Tensor, r: Tensor, t: Tensor, condition: GuidedCondition) -> Tensor:
        s = torch.maximum(move_on_grid(t, self.bootstrap_step, self.networks.grid_shift(x_t)), r)
        x_s = self.networks.integrate_teacher(x_t, s, t, 1, condition, self.solver)
        return (x_t - self.networks.student_step(x_s, r, s, condition)) / expand(t - r, x_t)

    def _differential(
        self, x_t: Tensor, r: Tensor, t: Tensor, condition: GuidedCondition
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        v = self.networks.teacher_velocity(x_t, t, condition)

        def network(rows: Tensor) -> AverageVelocityFn:
            known = condition[rows]
            return lambda x, r, t: self.networks.average_velocity(x, r, t, known)

        (equal, equal_count), (wide, wide_count) = self.networks.rows_where(t <= r), self.networks.rows_where(t > r)
        target, u, logs = v.clone(), [], {}
        if len(equal):
            u.append(network(equal)(x_t[equal], r[equal], t[equal]))
        if len(wide):
            point = x_t[wide], r[wide], t[wide]
            value, dudt = self.derivative.value_and_derivative(network(wide), *point, v[wide])
            u.append(value)
            counted = wide[:wide_count]
            target[counted] -= self.tangent_weight * expand(t - r, v)[counted] * dudt[:wide_count]
            logs["dudt_norm"] = rms(dudt)
        if equal_count < len(equal):  # called for the other processes alone, which need its backward pass as well
            u = [u[1] + 0 * u[0].sum()]
            equal = equal[:0]
        elif wide_count < len(wide):
            u = [u[0] + 0 * u[1].sum()]
            wide = wide[:0]
        order = torch.cat([equal, wide]).argsort()
        return torch.cat(u)[order], target, logs

    # Networks, planner and checkpoints

    def auxiliary_students(self) -> dict[str, StudentOptions]:
        """Options of the alignment's critic."""
        return {} if self.alignment is None else {"alignment.critic": self.alignment.critic_options(self.student_options)}

    def on_fit_start(self) -> None:
        """Check the student's derivative if the differential solution trains or may come."""
        super().on_fit_start()
        if "differential" in self._expected_phases | {self.solution}:
            context = self.trainer.precision_plugin.forward_context
            place = self.evaluator.latent_shape, self.device
            resumes = self.trainer.ckpt_path is not None
            report = check_derivative(self.derivative, self.networks, *place, context, resumes)
            report_derivative(report, self.loggers)

    def fix_random_choices(self) -> None:
        """Take r < t in all rows, and fix the choices of trajectories and alignment."""
        super().fix_random_choices()
        self.equal_fraction = 0.0
        if self.alignment is not None:
            self.alignment.fix_random_choices()

    def expected_calls(self, phase: str) -> dict[str, float]:
        """The regression's calls in a batch with rows of both kinds, those of trajectories, and the alignment's."""
        equal, wide = self.equal_fraction > 0, self.equal_fraction < 1
        if phase == "differential":
            passes = 1 if self.derivative.kind == "exact" else 3
            regression = {"student": equal + wide * passes, "student_backward": equal + wide}
            target = self.networks.teacher_calls()
        else:
            steps = self.solver_steps if phase == "discrete" else 1
            own = wide * (phase == "bootstrapped")
            regression = {"student": 1 + own, "student_backward": 1}
            target = self.networks.teacher_calls(equal + wide * evaluations(self.solver, steps))
        alignment = {} if self.alignment is None else self.alignment.expected_calls(self.networks)
        return total_calls(regression, target, self.trajectory_calls(), alignment)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the phase, in which a resumed run continues, and the solution that was configured."""
        super().on_save_checkpoint(checkpoint)
        phase = {"solution": self._solution, "differential_since": self._differential_since}
        checkpoint["meanflow"] = {**phase, "configured": self._configured}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue in the phase that was saved, unless another solution is configured now."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("meanflow", {})  # another method has none
        if saved.get("configured") == self._configured:
            self._solution = saved["solution"]
            self._differential_since = saved["differential_since"]
        elif self._solution == "differential":
            self._differential_since = saved.get("differential_since") or checkpoint["global_step"]


def rms(x: Tensor) -> Tensor:
    """Root mean square of all entries."""
    return x.square().mean().sqrt()
