"""DMD2: distribution matching distillation by the difference of two scores."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.adversarial import logistic_discriminator, logistic_generator
from lightning_distill.flow.distribution_matching import DIVERGENCES, DiffusedState, Divergence, diffuse
from lightning_distill.flow.times import TimeSampler
from lightning_distill.methods.auxiliary import AuxiliaryLoss, AuxiliaryTraining
from lightning_distill.methods.base import Objective, ObjectiveSteps
from lightning_distill.methods.calls import total_calls
from lightning_distill.methods.critic import EVENLY, CriticMethod, TrajectoryState
from lightning_distill.methods.discriminator import Discriminator, discriminator_loss, sample_gradient_loss
from lightning_distill.methods.divergence import DivergenceWeight
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.teachers.model_adapter import Condition
from lightning_distill.teachers.student_options import LoraOptions


@dataclass(frozen=True)
class CriticGan:
    """The discriminator on the critic's features, and the weights of its losses, which are those of DMD2's code for SDXL.

    Args:
        student_weight: Weight of the student's adversarial loss beside matching, above 0.
        critic_weight: Weight of the discriminator's loss in the critic's loss beside flow matching, at least 0; 0 trains the
            heads alone.
        layers: Indices of the critic's transformer blocks, from 0; None is four, the last and others evenly before it.
        hidden: Width of the heads, at least 1.
        lr: Learning rate of the heads; None is the critic's.
        time_sampler: Distribution of the discriminator's noise levels.
        divergence: Divergence that matching minimises (f-distill, arXiv 2502.15681). Others than DMD2's "reverse_kl" weight
            samples by the density ratio that the discriminator estimates, at the cost of another forward of the critic. All but
            "softened_reverse_kl" are less mode-seeking.

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

    The student G predicts :math:`x = G(x_t)`, from noise or, in several steps, from its own re-noised samples (section 4.5:
    backward simulation; gradient through the last step only). With :math:`x_\tau = (1 - \tau) x + \tau \, \text{noise}'`,

    .. math:: \nabla L = \frac{\hat x_0^F(x_\tau) - \hat x_0^T(x_\tau)}{\mathrm{mean} \, |x - \hat x_0^T|} \frac{dG}{d\theta},

    applied as :math:`\frac12 \| x - \mathrm{sg}(x - g) \|^2`. The critic :math:`v_F` learns the student's score by flow
    matching on its samples, `critic_updates` times for each batch of the student's (section 4.2). An optional discriminator on
    the critic's features separates samples from data, both noised to tau (section 4.3). It needs images as data; otherwise
    prompts suffice. With it, :math:`\nabla L` may be weighted for another divergence than the reverse Kullback-Leibler
    divergence (`CriticGan.divergence`).

    The student is evaluated at r = 0 only, and samples by predicting x0 and re-noising (`stochastic_sampling`).

    Args:
        nfe: Numbers of steps of the student; each batch samples one, so that one listed twice is sampled twice as often.
        guidance_scale: Guidance scale of the teacher's score, at least 0; None is the scale that the student learns.
        critic_updates: Critic updates for each batch, at least 1; each but the last is on fresh samples.
        critic_lr: Learning rate of the critic's AdamW; the default is that of the paper's code for SDXL.
        critic_clip: Largest norm of the critic's gradients; the default is that of the paper's code for SDXL.
        critic_lora: LoRA of the critic on the teacher's weights; "student": the student's LoRA options, if it has any; None:
            all weights of the critic train.
        gan: The discriminator, or None.
        time_sampler: Distribution of tau, in [0.02, 0.98]. Low noise levels correct single samples, high ones the frequencies
            of modes; low levels alone lose modes.
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
            lr = critic_lr if gan.lr is None else gan.lr
            self.auxiliary.add("heads", AuxiliaryTraining(lr, clip=critic_clip, reads_features=True))
        divergence = "reverse_kl" if gan is None else gan.divergence
        self.divergence_weight = None if divergence == "reverse_kl" else DivergenceWeight(divergence)

    heads: Discriminator
    feature_layers: tuple[int, ...]

    @property
    def needs_images(self) -> bool:
        """True with a discriminator, which compares samples with data."""
        return self.gan is not None

    def objective(self, x0: Tensor, condition: Condition) -> ObjectiveSteps:
        """Roll out the student, train critic and heads on its samples, and match the distributions."""
        guided = self.networks.guided_condition(condition)
        state, t = self.roll_out(torch.randn_like(x0), guided)
        if self.gan is None:
            for auxiliary in self.critic_losses(state, guided):
                yield auxiliary
            logs = {"critic_loss": auxiliary.loss.detach()}
            return Objective(self.matching.student_loss(self.networks, state, guided), t, logs)
        for current in self.critic_states(state, guided):
            logs = yield from self._critic_and_heads(self.gan, x0, current, guided)
        weight = None if self.divergence_weight is None else self._weight(self.divergence_weight, guided)
        loss = self.matching.student_loss(self.networks, state, guided, weight)
        adversarial = self.adversarial_loss(state, guided)
        logs["adversarial_loss"] = adversarial.detach().mean()
        return Objective(loss + self.gan.student_weight * adversarial, t, logs)

    def _critic_and_heads(
        self, gan: CriticGan, x0: Tensor, state: TrajectoryState, condition: GuidedCondition
    ) -> Generator[AuxiliaryLoss, None, dict[str, Tensor]]:
        """Yields the losses of the heads and then of the critic, which contains that of the updated heads.

        Samples and data are noised to the same tau.
        """
        critic_loss = self.matching.critic_loss(self.networks, state, condition)
        fake = self._noised(state.x_s.detach())
        real = diffuse(x0, torch.zeros_like(fake.tau), fake.tau)
        with torch.set_grad_enabled(gan.critic_weight > 0):
            real_features, fake_features = self._features(real, condition), self._features(fake, condition)
        loss, logs = discriminator_loss(self.heads, real_features, fake_features, fake.tau, logistic_discriminator)
        yield AuxiliaryLoss("heads", loss)
        scores = self.heads(real_features, fake.tau), self.heads(fake_features, fake.tau)
        gan_loss = gan.critic_weight * logistic_discriminator(*scores).mean()
        yield AuxiliaryLoss("matching.critic", critic_loss + gan_loss)
        return {"critic_loss": critic_loss.detach(), **logs}

    def adversarial_loss(self, state: TrajectoryState, condition: GuidedCondition) -> Tensor:
        """The student's loss (B,) from the scores of the discriminator, without its weight."""

        def generator_loss(x: Tensor) -> Tensor:
            noised = self._noised(x)
            return logistic_generator(self.heads(self._features(noised, condition), noised.tau))

        return sample_gradient_loss(state.x_s, generator_loss)

    def _noised(self, x: Tensor) -> DiffusedState:
        """Samples (B, C, h, w) at the discriminator's noise levels."""
        assert self.gan is not None
        s = torch.zeros(len(x), device=x.device)
        return diffuse(x, s, self.gan.time_sampler(len(x), x.device))

    def _weight(self, divergence: DivergenceWeight, condition: GuidedCondition) -> Callable[[DiffusedState], Tensor]:
        return lambda state: divergence(self.heads(self._features(state, condition), state.tau), state.tau)

    def _features(self, state: DiffusedState, condition: GuidedCondition) -> list[Tensor]:
        critic, s = self.matching.critic, torch.zeros_like(state.tau)
        inputs = condition.prompts, self.feature_layers, condition.scale
        return self.adapter.features(critic, state.x_tau, s, state.tau, *inputs)

    # Networks and planner

    def setup(self, stage: str) -> None:
        """Check the settings, the discriminator's layers among them."""
        super().setup(stage)
        if self.gan is not None:
            self.adapter.feature_widths(self.gan.layers)

    def build_networks(self) -> None:
        """Build teacher, student, critic and heads."""
        super().build_networks()
        if self.gan is not None:
            widths = self.adapter.feature_widths(self.gan.layers)
            self.feature_layers = tuple(widths)
            self.heads = Discriminator(list(widths.values()), self.gan.hidden)

    def expected_calls(self, phase: str) -> dict[str, float]:
        """Those of the critic, and the passes of its features to the discriminator."""
        calls = super().expected_calls(phase)
        if self.gan is None:
            return calls
        updates, trains = self.matching.critic_updates, self.gan.critic_weight > 0
        features = 2 * updates + 1 + (self.divergence_weight is not None)
        return total_calls(calls, {"critic": features, "critic_backward": 2 * updates * trains + 1})
