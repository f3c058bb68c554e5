"""Trajectory distribution alignment, an auxiliary loss against the mean-seeking of one and two steps."""

from collections.abc import Generator, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.auxiliary import AuxiliaryLoss
from lightning_distill.methods.calls import mean_rolled_steps, total_calls
from lightning_distill.methods.critic import DistributionMatching, TrajectoryState, critic_training, roll_out
from lightning_distill.methods.networks import GuidedCondition, Networks
from lightning_distill.teachers.student_options import LoraOptions


class TrajectoryAlignment(DistributionMatching):
    r"""Matches the distributions along the student's few-step trajectory to the teacher's.

    The student is rolled out from noise over a few-step grid to a state :math:`x_s`, with gradient through the last step. The
    state is diffused to :math:`x_\tau = a x_s + b \, \text{noise}'`. A critic :math:`v_F(x_\tau, s, \tau)`, trained by flow
    matching on these states, estimates the student's score; the teacher gives the real score. The gradient of the divergence
    between the two (DMD2, arXiv 2405.14867; Trajectory Distribution Matching, arXiv 2503.06674),

    .. math:: g = \frac{\hat x_0^F(x_\tau) - \hat x_0^T(x_\tau)}{\mathrm{mean} \, |x_s - \hat x_0^T|},

    is applied as :math:`\frac12 \| x_s - \mathrm{sg}(x_s - g) \|^2`. This is this project's reading of the auxiliary loss of
    arXiv 2605.17834, whose formulas are not public.

    Args:
        weight: Weight of the loss beside the regression, above 0.
        nfe: Numbers of steps of the grids; each batch samples one, so that one listed twice is sampled twice as often.
        guidance_scale: Guidance scale of the teacher here, at least 0; None is the scale that the student learns. The scores
            for matching may be guided more than the trajectories for regression.
        critic_updates: Critic updates for each batch, at least 1; each accumulated batch counts.
        critic_lr: Learning rate of the critic's AdamW.
        critic_clip: Largest norm of the critic's gradients.
        start_step: Optimizer step from which the critic trains.
        critic_warmup_steps: Number of steps for which the critic trains alone before the student is aligned.
        critic_lora: LoRA of the critic on the teacher's weights; "student": the student's LoRA options, if it has any; None:
            all weights of the critic train.

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
        super().__init__(guidance_scale, critic_updates, critic_lora, "alignment")
        self.training_of_critic = critic_training(critic_lr, critic_clip, "alignment")
        if not weight > 0:
            raise ConfigurationError(f"alignment.weight is {weight}; set it above 0, or alignment to null for none")
        if not nfe or min(nfe) < 1:
            raise ConfigurationError(f"alignment.nfe is {list(nfe)}; give numbers of steps of at least 1")
        if start_step < 0 or critic_warmup_steps < 0:
            raise ConfigurationError(
                f"alignment.start_step is {start_step} and alignment.critic_warmup_steps is {critic_warmup_steps}; set both to "
                "0 or more"
            )
        self.weight = weight
        self.nfe = tuple(nfe)
        self.start_step = start_step
        self.critic_warmup_steps = critic_warmup_steps

    def active(self, step: int) -> bool:
        """Whether the alignment takes part at an optimizer step."""
        return step >= self.start_step

    def losses(
        self, networks: Networks, noise: Tensor, condition: GuidedCondition, step: int
    ) -> Generator[AuxiliaryLoss, None, tuple[Tensor, dict[str, Tensor]]]:
        """Yields the critic's losses, and returns the student's.

        Args:
            networks: Networks of the method.
            noise: Start of the trajectories (B, C, h, w).
            condition: Condition of the batch.
            step: Optimizer step of the run.

        Returns:
            The weighted loss (B,), and scalars to log.
        """
        warming_up = step < self.start_step + self.critic_warmup_steps
        with torch.set_grad_enabled(torch.is_grad_enabled() and not warming_up):
            state = self.roll_out(networks, noise, condition)
        for _ in range(self.critic_updates):
            critic_loss = self.critic_loss(networks, state, condition)
            yield AuxiliaryLoss("alignment.critic", critic_loss)
        logs = {"critic_loss": critic_loss.detach()}
        if warming_up:
            return torch.zeros(len(noise), device=noise.device), logs
        loss = self.weight * self.student_loss(networks, state, condition)
        return loss, logs | {"alignment_loss": loss.detach().mean()}

    def roll_out(self, networks: Networks, noise: Tensor, condition: GuidedCondition) -> TrajectoryState:
        """The state at the end of a random step of a sampled grid, with gradient through that step only."""
        return roll_out(networks, noise, condition, self.nfe)[0]

    def fix_random_choices(self) -> None:
        """Roll out one step from the start of training on, and update the critic once."""
        self.start_step = self.critic_warmup_steps = 0
        self.nfe = (1,)
        self.critic_updates = 1

    def expected_calls(self, networks: Networks) -> dict[str, float]:
        """Mean number of network calls of a step."""
        return total_calls(
            {"student": mean_rolled_steps(self.nfe), "student_backward": 1},
            {"critic": self.critic_updates + 1, "critic_backward": self.critic_updates},
            networks.teacher_calls(student_mix=False) if self.guidance_scale is None else {"teacher": 1},
        )
