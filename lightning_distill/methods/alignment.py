"""Trajectory distribution alignment: the cure for the mean-seeking of one and two steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.critic import DistributionMatching, TrajectoryState, roll_out
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.teachers.student_options import LoraOptions

if TYPE_CHECKING:
    from lightning_distill.methods.base import TeacherStudentBase


class TrajectoryAlignment(DistributionMatching):
    r"""Matches the distributions along the student's own few-step trajectory to the teacher's.

    The student is rolled from noise over a few-step grid to a state :math:`x_s`, with gradient through the last segment.
    It is diffused on, :math:`x_\tau = a x_s + b \, \text{noise}'`. A critic :math:`v_F(x_\tau, s, \tau)`, trained by flow
    matching on these states, estimates the student's score, the teacher gives the real one, and the gradient of the
    divergence between the two (DMD2, arXiv 2405.14867; Trajectory Distribution Matching, arXiv 2503.06674),

    .. math:: g = \frac{\hat x_0^F(x_\tau) - \hat x_0^T(x_\tau)}{\mathrm{mean} \, |x_s - \hat x_0^T|},

    is applied as :math:`\frac12 \| x_s - \mathrm{sg}(x_s - g) \|^2`. The critic is a network of two times that starts as the
    teacher: until the student is exact, states of different s have different distributions at the same tau, and with one
    score for all the gradient would not vanish where each is right. It is the auxiliary loss of arXiv 2605.17834 in this
    project's reading: its formulas are not public.

    Args:
        weight: Of the loss beside the regression, above 0.
        nfe: Numbers of steps of the grids; one is drawn for each batch, so that one listed twice is drawn twice as often.
        guidance_scale: Guidance scale of the teacher here, at least 0; None is the one that the student learns. The scores that
            distributions are matched by may be guided more than the trajectories that are regressed.
        critic_updates: Critic updates for each batch, at least 1; accumulated batches count each.
        critic_lr: Learning rate of the critic's AdamW.
        critic_clip: Largest norm of the critic's gradients.
        start_step: Optimizer step from which the critic trains.
        critic_warmup_steps: Steps for which the critic trains alone before the student is aligned.
        critic_lora: LoRA of the critic, on the teacher's own weights; "student": the student's, if it has one; None: the critic
            trains as a whole.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    def __init__(
        self,
        weight: float = 1.0,
        nfe: Sequence[int] = (1, 2, 4),
        guidance_scale: float | None = None,
        critic_updates: int = 1,
        critic_lr: float = 5e-4,
        critic_clip: float = 1.0,
        start_step: int = 0,
        critic_warmup_steps: int = 0,
        critic_lora: LoraOptions | Literal["student"] | None = "student",
    ) -> None:
        super().__init__(guidance_scale, critic_updates, critic_lr, critic_clip, critic_lora, "alignment")
        if not weight > 0:
            raise ConfigurationError(f"alignment.weight is {weight}; set it above 0, or alignment to null for none")
        if not nfe or min(nfe) < 1:
            raise ConfigurationError(f"alignment.nfe is {list(nfe)}; give numbers of steps of at least 1")
        if start_step < 0 or critic_warmup_steps < 0:
            raise ConfigurationError("alignment.start_step and alignment.critic_warmup_steps must not be negative")
        self.weight = weight
        self.nfe = tuple(nfe)
        self.start_step = start_step
        self.critic_warmup_steps = critic_warmup_steps

    def active(self, step: int) -> bool:
        """Whether the alignment takes part at an optimizer step."""
        return step >= self.start_step

    def forward(
        self, module: TeacherStudentBase, noise: Tensor, condition: GuidedCondition
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Update the critic, then the loss of the student.

        Args:
            module: The method, whose student, teacher and guidance are used.
            noise: Where trajectories start (B, C, h, w).
            condition: Of the batch.

        Returns:
            The weighted loss (B,), and scalars to log.
        """
        warming_up = module.global_step < self.start_step + self.critic_warmup_steps
        with torch.set_grad_enabled(torch.is_grad_enabled() and not warming_up):
            state = self.roll_out(module, noise, condition)
        for _ in range(self.critic_updates):
            critic_loss = self.update_critic(module, state, condition)
        logs = {"critic_loss": critic_loss}
        if warming_up:
            return torch.zeros(len(noise), device=noise.device), logs
        loss = self.weight * self.student_loss(module, state, condition)
        return loss, logs | {"alignment_loss": loss.detach().mean()}

    def roll_out(self, module: TeacherStudentBase, noise: Tensor, condition: GuidedCondition) -> TrajectoryState:
        """Roll the student over a grid of random length to the end of a random segment, with gradient through that only."""
        return roll_out(module, noise, condition, self.nfe)[0]
