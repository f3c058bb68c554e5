"""Teacher, student and EMA of a method: their velocities under guidance, and the student's derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.derivative import (
    AverageVelocityFn,
    difference_step,
    finite_difference,
    value_and_time_derivative,
)
from lightning_distill.flow.guidance import improved_mix
from lightning_distill.flow.path import flow_step
from lightning_distill.flow.solvers import integrate
from lightning_distill.methods.guidance import Guidance
from lightning_distill.sharding.ema import ShardedEMA, StudentEMA
from lightning_distill.sharding.protocols import Sharding
from lightning_distill.teachers.model_adapter import Condition, ModelAdapter
from lightning_distill.teachers.student_options import StudentOptions

DerivativeKind = Literal["exact", "finite_difference"]


@dataclass(frozen=True)
class GuidedCondition:
    """Conditions of a batch and its guidance scales.

    Attributes:
        prompts: Conditions of the B prompts.
        null: Condition of the empty prompt, in B rows.
        scale: Guidance scale: one of each sample (B,), or a number for all.
    """

    prompts: Condition
    null: Condition
    scale: Tensor | float

    def __getitem__(self, rows: Tensor) -> GuidedCondition:
        """The rows (N,)."""
        scale = self.scale[rows] if isinstance(self.scale, Tensor) else self.scale
        return GuidedCondition(select_rows(rows, self.prompts), select_rows(rows, self.null), scale)


class Networks(nn.Module):
    """The networks of a method and their velocities.

    States are (B, C, h, w); times are (B,), float32, in [0, 1], and 1 is noise.

    Args:
        adapter: Teacher family, which evaluates the networks.
        guidance: Guidance of the teacher that the student learns.
        null_condition: Function from a batch size B to the condition of the empty prompt, in B rows.
        caption_dropout: Share of captions replaced by the empty prompt in training.
        stochastic_sampling: Whether the student's sampling step predicts x0 and re-noises it (arXiv 2303.01469, Algorithm 1).

    Attributes:
        sharding: Strategy that shards the networks, or None.
    """

    teacher: nn.Module
    student: nn.Module
    ema: StudentEMA | ShardedEMA | None

    def __init__(
        self,
        adapter: ModelAdapter,
        guidance: Guidance,
        null_condition: Callable[[int], Condition],
        caption_dropout: float = 0.0,
        stochastic_sampling: bool = False,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.guidance = guidance
        self.null_condition = null_condition
        self.caption_dropout = caption_dropout
        self.stochastic_sampling = stochastic_sampling
        self.sharding: Sharding | None = None
        self.ema = None

    @property
    def built(self) -> bool:
        """Whether the student has been built."""
        return "student" in self._modules

    @property
    def sampling_student(self) -> nn.Module:
        """The student that is validated and exported: its EMA where there is one."""
        return self.student if self.ema is None else self.ema.module

    def build_ema(self, decay: float, build_copy: Callable[[], nn.Module]) -> None:
        """Add an EMA of the student, which starts equal to it.

        Args:
            decay: Decay of the EMA, in (0, 1).
            build_copy: Function that builds another network like the student; sharded networks cannot be copied.
        """
        if self.sharding is None:
            self.ema = StudentEMA(self.student, get_ema_multi_avg_fn(decay))
        else:
            self.ema = ShardedEMA(build_copy(), decay)
            self.ema.start_from(self.student)
        self.ema.requires_grad_(False)

    # Conditions

    def guided_condition(self, prompts: Condition) -> GuidedCondition:
        """Condition of a training batch: captions are dropped at random, and each sample gets a guidance scale."""
        first = next(iter(prompts.values()))
        null = self.null_condition(len(first))
        prompts = drop_captions(prompts, null, self.caption_dropout)
        return GuidedCondition(prompts, null, self._sample_scales(len(first), first.device))

    def _sample_scales(self, batch_size: int, device: torch.device) -> Tensor:
        """A guidance scale for each sample (B,), float32."""
        if self.guidance.scales is None:
            return torch.full((batch_size,), self.guidance.scale, dtype=torch.float32, device=device)
        choices = torch.tensor(self.guidance.scales, dtype=torch.float32, device=device)
        return choices[torch.randint(len(choices), (batch_size,), device=device)]

    # Velocities

    def average_velocity(self, x_t: Tensor, r: Tensor, t: Tensor, condition: GuidedCondition) -> Tensor:
        """The student's average velocity u from t down to r, with its graph where gradients are enabled."""
        return self.adapter.average_velocity(self.student, x_t, r, t, condition.prompts, condition.scale)

    @torch.no_grad()
    def target_velocity(
        self, x_t: Tensor, r: Tensor, t: Tensor, condition: GuidedCondition, network: nn.Module | None = None
    ) -> Tensor:
        """The average velocity u of the student, or of a network like it, in evaluation mode and without gradient."""
        network = self.student if network is None else network
        training = network.training
        network.eval()
        u = self.adapter.average_velocity(network, x_t, r, t, condition.prompts, condition.scale)
        network.train(training)
        return u

    @torch.no_grad()
    def teacher_velocity(self, x_t: Tensor, t: Tensor, condition: GuidedCondition, *, student_mix: bool = True) -> Tensor:
        """The guided velocity v~ of the teacher, which the student learns.

        Args:
            x_t: State (B, C, h, w).
            t: Time (B,).
            condition: Condition of the batch.
            student_mix: Whether guidance of kind "improved" mixes in the student, as its training target does. Otherwise it is
                evaluated at the fixed point of that mix, two-branch guidance of the teacher alone.
        """
        guidance, adapter, prompts, scale = self.guidance, self.adapter, condition.prompts, condition.scale
        if guidance.kind != "improved":
            return adapter.guided_velocity(self.teacher, x_t, t, prompts, condition.null, scale, guidance.interval)
        if not student_mix and not adapter.embeds_guidance:
            return adapter.guided_velocity(self.teacher, x_t, t, prompts, condition.null, guidance.two_branch_scale)
        v = adapter.velocity(self.teacher, x_t, t, prompts, scale)
        if student_mix:
            u_cond = self.target_velocity(x_t, t, t, condition)
            u_null = self.target_velocity(x_t, t, t, GuidedCondition(condition.null, condition.null, scale))
            return improved_mix(v, u_cond, u_null, guidance.omega, guidance.kappa)
        v_null = adapter.velocity(self.teacher, x_t, t, adapter.null_condition_for(prompts, condition.null), scale)
        return adapter.mix_guidance(v, v_null, torch.full_like(t, guidance.two_branch_scale))

    def teacher_calls(self, count: float = 1.0, *, student_mix: bool = True) -> dict[str, float]:
        """Numbers of network calls of `count` evaluations of `teacher_velocity`, for the planner."""
        if self.guidance.kind != "improved":
            return {"teacher": count}
        if student_mix:
            return {"teacher": count, "student": 2 * count}
        return {"teacher": 2 * count if self.adapter.embeds_guidance else count}

    @torch.no_grad()
    def integrate_teacher(
        self, x_t: Tensor, r: Tensor, t: Tensor, steps: int, condition: GuidedCondition, solver: str = "euler"
    ) -> Tensor:
        """State (B, C, h, w) at r of the guided teacher's trajectory through x_t, in steps even on the sampling grid."""

        def velocity(x: Tensor, s: Tensor) -> Tensor:
            return self.teacher_velocity(x, s, condition)

        return integrate(velocity, x_t, t, r, steps, solver, self.grid_shift(x_t))

    def student_step(
        self, x_t: Tensor, r: Tensor, t: Tensor, condition: GuidedCondition, network: nn.Module | None = None
    ) -> Tensor:
        """State (B, C, h, w) at r after one step of the student, or of a network like it, from x_t; without gradient."""
        return flow_step(x_t, self.target_velocity(x_t, r, t, condition, network), r, t)

    def grid_shift(self, x: Tensor) -> float:
        """Shift of the sampling grid for states (B, C, h, w)."""
        return self.adapter.time_shift(tuple(x.shape[1:]))

    def time_grid(self, nfe: int, x: Tensor) -> Tensor:
        """Times (nfe + 1,) of the sampling grid for states (B, C, h, w), from 1 down to 0, on their device."""
        return self.adapter.time_grid(nfe, tuple(x.shape[1:])).to(x.device)

    # Decisions that processes share

    def any_process(self, flag: bool, device: torch.device) -> bool:
        """Whether a flag is set in any of the processes that share sharded networks; without sharding, the flag itself.

        A sharded network needs all processes for each of its forwards, so they must make the same number of calls.
        """
        if self.sharding is None:
            return flag
        return bool(self.sharding.reduce(torch.tensor(float(flag), device=device), reduce_op="sum") > 0)

    def first_process(self, number: int) -> int:
        """The number of the first process that shares sharded networks; without sharding, the number itself."""
        return number if self.sharding is None else self.sharding.broadcast(number)

    def rows_where(self, mask: Tensor) -> tuple[Tensor, int]:
        """Rows (N,) of a batch for a network call, and how many of them count.

        Without such rows the network is not called. Where other processes call a sharded network, this process calls it with
        row 0, which does not count.
        """
        rows = mask.nonzero()[:, 0]
        if self.any_process(len(rows) > 0, mask.device) and len(rows) == 0:
            return rows.new_zeros(1), 0
        return rows, len(rows)


class StudentDerivative:
    """Evaluates a student's derivative along the flow.

    Args:
        kind: "exact", by dual numbers, or "finite_difference". The latter costs two more forward passes, and suits students
            with an operation without a forward-mode rule.
        adapter: Teacher family.
        options: Options of the student, which decide the step of finite differences.

    Attributes:
        dtype: Precision of the student's matrix products, which decides that step too; set when training starts.

    Raises:
        ConfigurationError: If `kind` is another.
    """

    dtype: torch.dtype = torch.float32

    def __init__(self, kind: DerivativeKind, adapter: ModelAdapter, options: StudentOptions) -> None:
        if kind not in ("exact", "finite_difference"):
            raise ConfigurationError(f"model.derivative is {kind!r}; choose exact or finite_difference")
        self.kind = kind
        self.adapter = adapter
        self.options = options

    def value_and_derivative(
        self, fn: AverageVelocityFn, x: Tensor, r: Tensor, t: Tensor, tangent: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Value with its graph, and derivative along (tangent, 0, 1) without one, (B, C, h, w) each.

        Args:
            fn: A function of the student, of (x, r, t).
            x: State at t (B, C, h, w).
            r: End (B,).
            t: Start (B,).
            tangent: Velocity of x (B, C, h, w).
        """
        with self.adapter.frozen_routing():
            if self.kind == "exact":
                return value_and_time_derivative(fn, x, r, t, tangent)
            return fn(x, r, t), self.difference(fn, x, r, t, tangent)

    def difference(self, fn: AverageVelocityFn, x: Tensor, r: Tensor, t: Tensor, tangent: Tensor) -> Tensor:
        """The derivative by a central difference; its step suits the precision. Arguments as in `value_and_derivative`."""
        step = difference_step(self.adapter.time_frequency(self.options), self.dtype)
        return finite_difference(fn, x, r, t, tangent, step)


def select_rows(rows: Tensor, condition: Condition) -> Condition:
    """The rows (N,) of a condition."""
    return {name: value[rows] for name, value in condition.items()}


def drop_captions(condition: Condition, null: Condition, share: float) -> Condition:
    """`condition` with a random share of its rows, in [0, 1), replaced by those of `null`."""
    if share == 0:
        return condition
    first = next(iter(condition.values()))
    return replace_rows(condition, null, torch.rand(len(first), device=first.device) < share)


def replace_rows(condition: Condition, null: Condition, dropped: Tensor) -> Condition:
    """`condition` with the rows where `dropped` (B,) is true replaced by those of `null`."""
    return {
        name: torch.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), null[name], value) for name, value in condition.items()
    }
