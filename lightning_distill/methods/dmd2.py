"""DMD2: a student whose samples have the teacher's distribution, by the difference of two scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.adversarial import logistic_discriminator, logistic_generator
from lightning_distill.flow.distribution_matching import DIVERGENCES, DiffusedState, Divergence, diffuse
from lightning_distill.flow.times import TimeSampler
from lightning_distill.methods.auxiliary import AuxiliaryTraining
from lightning_distill.methods.base import Objective
from lightning_distill.methods.critic import EVENLY, CriticMethod, TrajectoryState
from lightning_distill.methods.discriminator import (
    Discriminator,
    check_sharding_of_heads,
    discriminator_update,
    sample_gradient_loss,
)
from lightning_distill.methods.divergence import DivergenceWeight
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.teachers.model_adapter import Condition
from lightning_distill.teachers.student_options import LoraOptions


@dataclass(frozen=True)
class CriticGan:
    """The discriminator on the critic's features, and what its losses weigh. The weights are those of DMD2's code for SDXL.

    Args:
        student_weight: Of the student's loss, beside that of matching, above 0.
        critic_weight: Of the critic's loss, beside flow matching, at least 0; 0 trains the heads alone.
        layers: Places of the critic's transformer blocks, from 0; None is four, the last and others evenly before it.
        hidden: Width of the heads.
        lr: Learning rate of the heads; None is the critic's.
        time_sampler: Distribution of the noise levels at which it judges.
        divergence: What matching is to lessen (f-distill, arXiv 2502.15681): others than "reverse_kl", which is DMD2's, weigh
            samples by the density ratio that the discriminator sees, at the cost of another forward of the critic. All but
            "softened_reverse_kl" seek modes less.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    student_weight: float = 5e-3
    critic_weight: float = 1e-2
    layers: tuple[int, ...] | None = None
    hidden: int = 256
    lr: float | None = None
    time_sampler: TimeSampler = EVENLY
    divergence: Divergence = "reverse_kl"

    def __post_init__(self) -> None:
        if not self.student_weight > 0 or not self.critic_weight >= 0:
            raise ConfigurationError(
                f"gan.student_weight is {self.student_weight} and gan.critic_weight {self.critic_weight}; set the first above "
                "0, the second not below, or gan to null for none"
            )
        if self.hidden < 1:
            raise ConfigurationError(f"gan.hidden is {self.hidden}; take at least 1, 256 is usual")
        if self.lr is not None and not self.lr > 0:
            raise ConfigurationError(f"gan.lr is {self.lr}; set it above 0, or to null for the critic's")
        if self.divergence not in DIVERGENCES:
            raise ConfigurationError(f"gan.divergence is {self.divergence!r}; choose one of {', '.join(DIVERGENCES)}")


class DMD2(CriticMethod):
    r"""Improved distribution matching distillation (arXiv 2405.14867), without regression on the teacher's trajectories.

    The student G makes :math:`x = G(x_t)`, from noise or, in several steps, from its own samples noised again (section
    4.5: backward simulation; gradient through the last step only). With :math:`x_\tau = (1 - \tau) x + \tau \, \text{noise}'`,

    .. math:: \nabla L = \frac{\hat x_0^F(x_\tau) - \hat x_0^T(x_\tau)}{\mathrm{mean} \, |x - \hat x_0^T|} \frac{dG}{d\theta},

    applied as :math:`\frac12 \| x - \mathrm{sg}(x - g) \|^2`. The critic :math:`v_F` learns the student's score by flow
    matching on its samples, `critic_updates` times for each batch of the student's (section 4.2). A discriminator on the
    critic's features, which tells samples from data, both noised to tau, may be added (section 4.3); data are then needed, else
    prompts alone. With it :math:`\nabla L` may be weighted for another divergence than the reverse Kullback-Leibler
    (`CriticGan.divergence`).

    The student is asked for r = 0 only, and samples by going to data and back (`stochastic_sampling`).

    Args:
        nfe: Numbers of steps of the student; one is drawn for each batch, so that one listed twice is drawn twice as often.
        guidance_scale: Guidance scale of the teacher's score, at least 0; None is the one that the student learns.
        critic_updates: Critic updates for each batch, at least 1; each but the last is on fresh samples.
        critic_lr: Learning rate of the critic's AdamW; the default is that of the paper's code for SDXL.
        critic_clip: Largest norm of the critic's gradients; likewise.
        critic_lora: LoRA of the critic, on the teacher's own weights; "student": the student's, if it has one; None: the critic
            trains as a whole.
        gan: The discriminator, or None.
        time_sampler: Distribution of tau, in [0.02, 0.98]. Low noise levels tell what is wrong with a sample, and high ones
            whether there are as many of each kind as of the teacher's; low ones alone lose modes.
        **kwargs: Of `TeacherStudentBase`.

    Raises:
        ConfigurationError: If settings are out of range or contradict each other.
    """

    stochastic_sampling: ClassVar[bool] = True

    def __init__(
        self,
        *args: Any,
        nfe: Sequence[int] = (4,),
        guidance_scale: float | None = None,
        critic_updates: int = 5,
        critic_lr: float = 5e-7,
        critic_clip: float = 10.0,
        critic_lora: LoraOptions | Literal["student"] | None = "student",
        gan: CriticGan | None = None,
        time_sampler: TimeSampler = EVENLY,
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
            time_sampler=time_sampler,
            **kwargs,
        )
        self.gan = gan
        if gan is not None:
            self.heads_training = AuxiliaryTraining(critic_lr if gan.lr is None else gan.lr, clip=critic_clip)
        divergence = "reverse_kl" if gan is None else gan.divergence
        self.divergence_weight = None if divergence == "reverse_kl" else DivergenceWeight(divergence)

    heads: Discriminator
    feature_layers: tuple[int, ...]

    @property
    def needs_images(self) -> bool:
        """For the discriminator only."""
        return self.gan is not None

    def objective(self, x0: Tensor, condition: Condition) -> Objective:
        """Roll the student, teach critic and heads what it makes, and match."""
        guided = self.guided_condition(condition, len(x0))
        state, t = self.roll_out(torch.randn_like(x0), guided)
        if self.gan is None:
            logs = self.update_critic(state, guided)
            return Objective(self.matching.student_loss(self, state, guided), t, logs)
        logs = {}

        def tell_apart(current: TrajectoryState) -> Tensor:
            loss, found = self.discriminator_loss(x0, current, guided)
            logs.update(found)
            return loss

        logs |= self.update_critic(state, guided, tell_apart)
        weight = None if self.divergence_weight is None else self._weight(self.divergence_weight, guided)
        loss = self.matching.student_loss(self, state, guided, weight)
        adversarial = self.adversarial_loss(state, guided)
        logs["adversarial_loss"] = adversarial.detach().mean()
        return Objective(loss + self.gan.student_weight * adversarial, t, logs)

    def discriminator_loss(
        self, x0: Tensor, state: TrajectoryState, condition: GuidedCondition
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Update the heads, and then what their loss is to the critic, weighted, and scalars to log.

        Samples and data are noised to the same tau.
        """
        assert self.gan is not None
        fake = self._noised(state.x_s.detach())
        real = diffuse(x0, torch.zeros_like(fake.tau), fake.tau)
        with torch.set_grad_enabled(self.gan.critic_weight > 0):
            seen, judged = self._features(real, condition), self._features(fake, condition)
        optimizer = self.heads_training.optimizer(self.heads)
        logs = discriminator_update(self.heads, optimizer, seen, judged, fake.tau, logistic_discriminator)
        loss = logistic_discriminator(self.heads(seen, fake.tau), self.heads(judged, fake.tau)).mean()
        return self.gan.critic_weight * loss, logs

    def adversarial_loss(self, state: TrajectoryState, condition: GuidedCondition) -> Tensor:
        """The student's loss (B,) before the discriminator, not yet weighted."""

        def judge(x: Tensor) -> Tensor:
            noised = self._noised(x)
            return logistic_generator(self.heads(self._features(noised, condition), noised.tau))

        return sample_gradient_loss(state.x_s, judge)

    def _noised(self, x: Tensor) -> DiffusedState:
        """Samples (B, C, h, w) at noise levels at which they are judged."""
        assert self.gan is not None
        s = torch.zeros(len(x), device=x.device)
        return diffuse(x, s, self.gan.time_sampler(len(x), x.device))

    def _weight(self, divergence: DivergenceWeight, condition: GuidedCondition) -> Callable[[DiffusedState], Tensor]:
        return lambda state: divergence(self.heads(self._features(state, condition), state.tau), state.tau)

    def _features(self, state: DiffusedState, condition: GuidedCondition) -> list[Tensor]:
        network, s = self.matching.critic, torch.zeros_like(state.tau)
        told = condition.prompts, self.feature_layers, condition.scale
        return self.adapter.features(network, state.x_tau, s, state.tau, *told)

    # Networks

    def setup(self, stage: str) -> None:
        """Refuse settings that cannot work, the discriminator's among them."""
        super().setup(stage)
        if self.gan is not None:
            self.adapter.feature_widths(self.gan.layers)
            check_sharding_of_heads(self, "set trainer.strategy to auto or ddp, or model.gan to null")

    def build_networks(self) -> None:
        """Teacher, student, critic and heads."""
        super().build_networks()
        if self.gan is not None:
            widths = self.adapter.feature_widths(self.gan.layers)
            self.feature_layers = tuple(widths)
            self.heads = Discriminator(list(widths.values()), self.gan.hidden)

    def auxiliary_trainings(self) -> dict[str, AuxiliaryTraining]:
        """The critic's and the heads'."""
        return super().auxiliary_trainings() | ({} if self.gan is None else {"heads": self.heads_training})
