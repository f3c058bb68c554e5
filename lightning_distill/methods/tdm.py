"""TDM: trajectory distribution matching for a deterministic few-step student."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.methods.base import Objective, ObjectiveSteps
from lightning_distill.methods.critic import CriticMethod, TrajectoryState
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.teachers.model_adapter import Condition
from lightning_distill.teachers.student_options import LoraOptions


class TDM(CriticMethod):
    r"""Trajectory distribution matching (arXiv 2503.06674).

    The student steps from noise along its own few-step grid, :math:`x_s = x_t - (t - s) \, u(x_t, s, t)`. After each step, its
    distribution is matched to the teacher's at the noise levels of that step's interval, and at no others:

    .. math:: L = E_k \, E_{\tau \in (s, t)} \; \mathrm{KL}\big( p_\text{student}(x_\tau) \,\|\, p_\text{teacher}(x_\tau) \big),
        \quad x_\tau = a x_s + b \, \text{noise}', \quad (s, t) = (t_{k+1}, t_k),

    so that each step follows its part of the teacher's trajectory, in distribution and not point by point. The gradient is
    `flow.matching_gradient`, through the last step only. The critic receives s, which identifies the interval of a state.

    Args:
        nfe: Numbers of steps of the student; each batch samples one, so that one listed twice is sampled twice as often.
        guidance_scale: Guidance scale of the teacher's score, at least 0; None is the scale that the student learns.
        critic_updates: Critic updates for each batch, at least 1; each but the last is on fresh states.
        critic_lr: Learning rate of the critic's AdamW.
        critic_clip: Largest norm of the critic's gradients.
        critic_lora: LoRA of the critic on the teacher's weights; "student": the student's LoRA options, if it has any; None:
            all weights of the critic train.
        **kwargs: Of `TeacherStudentBase`.

    Raises:
        ConfigurationError: If settings are out of range or contradict each other.
    """

    def __init__(
        self,
        *args: Any,
        nfe: Sequence[int] = (4,),
        guidance_scale: float | None = None,
        critic_updates: int = 1,
        critic_lr: float = 1e-5,
        critic_clip: float = 1.0,
        critic_lora: LoraOptions | Literal["student"] | None = "student",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            nfe=nfe,
            guidance_scale=guidance_scale,
            critic_updates=critic_updates,
            critic_lr=critic_lr,
            critic_clip=critic_clip,
            critic_lora=critic_lora,
            **kwargs,
        )

    def roll_out(self, noise: Tensor, condition: GuidedCondition) -> tuple[TrajectoryState, Tensor]:
        """A state of the student, diffused within the interval of its last step, and the start (B,) of that interval."""
        state, t = super().roll_out(noise, condition)
        return TrajectoryState(state.x_s, state.s, end=t), t

    def objective(self, x0: Tensor, condition: Condition) -> ObjectiveSteps:
        """Roll out the student, train the critic on its states, and match the distributions."""
        guided = self.networks.guided_condition(condition)
        state, t = self.roll_out(torch.randn_like(x0), guided)
        for auxiliary in self.critic_losses(state, guided):
            yield auxiliary
        logs = {"critic_loss": auxiliary.loss.detach()}
        return Objective(self.matching.student_loss(self.networks, state, guided), t, logs)
