"""Teacher and student, asked about a batch under guidance: what every method's objective is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_distill.flow.guidance import improved_mix
from lightning_distill.flow.path import flow_step
from lightning_distill.flow.solvers import integrate
from lightning_distill.methods.condition import null_rows, select
from lightning_distill.methods.guidance import Guidance
from lightning_distill.methods.sharded_networks import ShardedNetworks
from lightning_distill.teachers.model_adapter import Condition, ModelAdapter


@dataclass(frozen=True)
class GuidedCondition:
    """What networks are told about a batch, and how far they are to follow it.

    Attributes:
        prompts: Condition of the prompts.
        null: Of the empty prompt, likewise of B rows.
        scale: Guidance scale of each sample (B,).
    """

    prompts: Condition
    null: Condition
    scale: Tensor

    def __getitem__(self, rows: Tensor) -> GuidedCondition:
        """The rows (N,) of it."""
        return GuidedCondition(select(rows, self.prompts), select(rows, self.null), self.scale[rows])


class GuidedNetworks(ShardedNetworks, ABC):
    """The part of `TeacherStudentBase` that an objective calls its networks by.

    States are (B, C, h, w), times are (B,), float32, in [0, 1], and 1 is noise.
    """

    adapter: ModelAdapter
    teacher: nn.Module
    student: nn.Module
    guidance: Guidance
    caption_dropout: float

    @abstractmethod
    def null_condition(self, batch_size: int) -> Condition:
        """Condition of the empty prompt, in B rows."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of the configured picture size."""

    def guided_condition(self, prompts: Condition, batch_size: int) -> GuidedCondition:
        """A batch's condition for training: a share of its captions dropped, and a guidance scale drawn for each sample."""
        null = self.null_condition(batch_size)
        prompts = null_rows(prompts, null, self.caption_dropout)
        return GuidedCondition(prompts, null, self.guidance.draw(batch_size, self.device))

    def average_velocity(self, x_t: Tensor, r: Tensor, t: Tensor, condition: GuidedCondition) -> Tensor:
        """The student's u from t down to r, with its graph where gradients are on."""
        return self.adapter.average_velocity(self.student, x_t, r, t, condition.prompts, condition.scale)

    @torch.no_grad()
    def evaluated(
        self, x_t: Tensor, r: Tensor, t: Tensor, condition: GuidedCondition, network: nn.Module | None = None
    ) -> Tensor:
        """The student's u in evaluation mode, for targets; or that of another network like it."""
        network = self.student if network is None else network
        training = network.training
        network.eval()
        u = self.adapter.average_velocity(network, x_t, r, t, condition.prompts, condition.scale)
        network.train(training)
        return u

    @torch.no_grad()
    def teacher_velocity(self, x_t: Tensor, t: Tensor, condition: GuidedCondition) -> Tensor:
        """The guided velocity v~ that the student learns."""
        prompts, scale = condition.prompts, condition.scale
        if self.guidance.kind != "improved":
            return self.guidance.teacher_velocity(self.adapter, self.teacher, x_t, t, prompts, condition.null, scale)
        v = self.adapter.velocity(self.teacher, x_t, t, prompts, scale)
        u_cond = self.evaluated(x_t, t, t, condition)
        u_null = self.evaluated(x_t, t, t, GuidedCondition(condition.null, condition.null, scale))
        return improved_mix(v, u_cond, u_null, self.guidance.omega, self.guidance.kappa)

    @torch.no_grad()
    def integrate_teacher(
        self, x_t: Tensor, r: Tensor, t: Tensor, steps: int, condition: GuidedCondition, solver: str = "euler"
    ) -> Tensor:
        """State at r of the guided teacher's trajectory through x_t, in steps that are even on the sampling grid."""

        def velocity(x: Tensor, s: Tensor) -> Tensor:
            return self.teacher_velocity(x, s, condition)

        return integrate(velocity, x_t, t, r, steps, solver, self.grid_shift(x_t))

    def student_step(
        self, x_t: Tensor, r: Tensor, t: Tensor, condition: GuidedCondition, network: nn.Module | None = None
    ) -> Tensor:
        """State at r that the student jumps to from x_t, for targets; or that another network like it does."""
        return flow_step(x_t, self.evaluated(x_t, r, t, condition, network), r, t)

    def grid_shift(self, x: Tensor) -> float:
        """Shift of the sampling grid for states (B, C, h, w)."""
        return self.adapter.time_shift(tuple(x.shape[1:]))
