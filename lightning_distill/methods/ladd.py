"""LADD: adversarial distillation on the features of the teacher."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.adversarial import hinge_discriminator, hinge_generator
from lightning_distill.flow.path import flow_step, interpolate
from lightning_distill.flow.times import LogitNormal, TimeSampler
from lightning_distill.methods.auxiliary import AuxiliaryLoss, AuxiliaryTraining
from lightning_distill.methods.base import Objective, ObjectiveSteps, TeacherStudentBase
from lightning_distill.methods.calls import total_calls
from lightning_distill.methods.discriminator import Discriminator, discriminator_loss, sample_gradient_loss
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.teachers.model_adapter import Condition


class LADD(TeacherStudentBase):
    r"""Latent adversarial diffusion distillation (arXiv 2403.12015).

    Samples :math:`x_0` of the guided teacher, or data, are noised to a time of the student's grid. The student predicts x0 in
    one step, :math:`x = x_t - t \, u(x_t, 0, t)`. Both are re-noised to tau. Heads :math:`D` on the features of the frozen
    teacher are trained to separate them:

    .. math:: L_D = E \, [\max(0, 1 - D(x_{0, \tau})) + \max(0, 1 + D(x_\tau))] + \gamma \, R_1, \quad L_G = -E \, D(x_\tau).

    High noise levels tau compare layouts, low ones textures. There is no other loss. The student is evaluated at r = 0 only,
    and samples by predicting x0 and re-noising (`stochastic_sampling`).

    Args:
        real: Real samples: "teacher", guided samples of the teacher, generated for each batch from noise, so that prompts
            suffice as data; or "data".
        teacher_steps: Steps of the teacher's samples, at least 1, even on the sampling grid.
        nfe: Number of steps of the student, at least 1.
        step_weights: Relative frequency of each step in training, from noise on: nfe numbers, none negative (section 3: mostly
            the first).
        warmup_steps: Optimizer steps for which only the steps of the cleaner half train.
        time_sampler: Distribution of tau.
        layers: Indices of the teacher's transformer blocks whose inputs are the features, from 0; None is four, the last and
            others evenly before it.
        hidden: Width of the heads, at least 1.
        discriminator_lr: Learning rate of the heads' AdamW, above 0.
        discriminator_clip: Largest norm of the heads' gradients, above 0.
        r1_weight: Gamma, at least 0; 0 is no penalty. The penalty is on the heads' gradient in the features, as in ADD (arXiv
            2311.17042), whose weight is the default.
        **kwargs: Of `TeacherStudentBase`.

    Raises:
        ConfigurationError: If settings are out of range or contradict each other.
    """

    stochastic_sampling: ClassVar[bool] = True
    learns_velocity: ClassVar[bool] = False

    def __init__(
        self,
        *args: Any,
        real: Literal["teacher", "data"] = "teacher",
        teacher_steps: int = 28,
        nfe: int = 4,
        step_weights: Sequence[float] = (0.7, 0.1, 0.1, 0.1),
        warmup_steps: int = 500,
        time_sampler: TimeSampler = LogitNormal(mean=1.0, std=1.0),
        layers: tuple[int, ...] | None = None,
        hidden: int = 256,
        discriminator_lr: float = 1e-4,
        discriminator_clip: float = 1.0,
        r1_weight: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if real not in ("teacher", "data"):
            raise ConfigurationError(f"model.real is {real!r}; choose teacher or data")
        for name, count in {"teacher_steps": teacher_steps, "nfe": nfe, "hidden": hidden}.items():
            if count < 1:
                raise ConfigurationError(f"model.{name} is {count}; set it to at least 1")
        if len(step_weights) != nfe or not all(weight >= 0 for weight in step_weights) or not 0 < sum(step_weights) < math.inf:
            raise ConfigurationError(
                f"model.step_weights is {list(step_weights)}; give a number for each of the {nfe} steps of model.nfe, not "
                "negative and not all 0"
            )
        if warmup_steps < 0:
            raise ConfigurationError(f"model.warmup_steps is {warmup_steps}; 0 is no warm-up")
        if warmup_steps > 0 and not sum(step_weights[nfe // 2 :]) > 0:
            raise ConfigurationError(
                f"model.warmup_steps is {warmup_steps}, and model.step_weights {list(step_weights)} leaves it no step of the "
                "cleaner half; set it to 0"
            )
        for name, value in {"discriminator_lr": discriminator_lr, "discriminator_clip": discriminator_clip}.items():
            if not value > 0:
                raise ConfigurationError(f"model.{name} is {value}; set it above 0")
        if not r1_weight >= 0:
            raise ConfigurationError(f"model.r1_weight is {r1_weight}; set it to 0 for none, or above")
        self.real = real
        self.teacher_steps = teacher_steps
        self.nfe = nfe
        self.step_weights = tuple(step_weights)
        self.warmup_steps = warmup_steps
        self.time_sampler = time_sampler
        self.layers = layers
        self.hidden = hidden
        self.r1_weight = r1_weight
        self.auxiliary.add("heads", AuxiliaryTraining(discriminator_lr, clip=discriminator_clip, reads_features=True))

    heads: Discriminator
    feature_layers: tuple[int, ...]

    @property
    def needs_images(self) -> bool:
        """Whether data are the real samples."""
        return self.real == "data"

    def objective(self, x0: Tensor, condition: Condition) -> ObjectiveSteps:
        """Denoise real samples by one student step, train the heads, and score the student's samples."""
        guided = self.networks.guided_condition(condition)
        if self.real == "teacher":
            x0 = self.teacher_samples(x0, guided)
        t = self.sample_steps(x0)
        x_t, r = interpolate(x0, torch.randn_like(x0), t), torch.zeros_like(t)
        x = flow_step(x_t, self.networks.average_velocity(x_t, r, t, guided), r, t)
        loss, logs = self.heads_loss(x0, x.detach(), guided)
        yield AuxiliaryLoss("heads", loss)
        return Objective(sample_gradient_loss(x, lambda x: self.adversarial_loss(x, guided)), t, logs)

    @torch.no_grad()
    def teacher_samples(self, like: Tensor, condition: GuidedCondition) -> Tensor:
        """Samples (B, C, h, w) of the guided teacher, of the shape of `like`."""
        start = torch.ones(len(like), device=like.device)
        noise = torch.randn_like(like)
        return self.networks.integrate_teacher(noise, torch.zeros_like(start), start, self.teacher_steps, condition)

    def sample_steps(self, like: Tensor) -> Tensor:
        """Start times (B,) of sampled steps of the student, for latents of the shape of `like`."""
        grid = self.networks.time_grid(self.nfe, like)
        weights = torch.tensor(self.step_weights, device=like.device)
        if self.global_step < self.warmup_steps:
            weights[: self.nfe // 2] = 0
        return grid[torch.multinomial(weights, len(like), replacement=True)]

    def heads_loss(self, real: Tensor, fake: Tensor, condition: GuidedCondition) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of the heads, and scalars to log.

        Args:
            real: Real samples (B, C, h, w).
            fake: The student's samples (B, C, h, w).
            condition: Condition of both.
        """
        tau = self.time_sampler(len(real), real.device)
        with torch.no_grad():
            real_features, fake_features = (self._features(x, tau, condition) for x in (real, fake))
        return discriminator_loss(self.heads, real_features, fake_features, tau, hinge_discriminator, self.r1_weight)

    def adversarial_loss(self, x: Tensor, condition: GuidedCondition) -> Tensor:
        """Loss (B,) of the student's samples from the scores of the heads."""
        tau = self.time_sampler(len(x), x.device)
        return hinge_generator(self.heads(self._features(x, tau, condition), tau))

    def _features(self, x: Tensor, tau: Tensor, condition: GuidedCondition) -> list[Tensor]:
        x_tau = interpolate(x, torch.randn_like(x), tau)
        inputs = condition.prompts, self.feature_layers, condition.scale
        return self.adapter.features(self.teacher, x_tau, None, tau, *inputs)

    # Networks and planner

    def setup(self, stage: str) -> None:
        """Check the settings, the discriminator's layers among them."""
        super().setup(stage)
        self.adapter.feature_widths(self.layers)

    def build_networks(self) -> None:
        """Build teacher, student and heads."""
        super().build_networks()
        widths = self.adapter.feature_widths(self.layers)
        self.feature_layers = tuple(widths)
        self.heads = Discriminator(list(widths.values()), self.hidden)
        checkpointing = getattr(self.teacher, "enable_gradient_checkpointing", None)
        if self.student_options.gradient_checkpointing and checkpointing is not None:
            checkpointing()  # the student's gradient passes through the teacher's blocks

    def expected_calls(self, phase: str) -> dict[str, float]:
        """One student step; the teacher samples, and gives the features of both kinds of samples and of the student's again."""
        samples = self.networks.teacher_calls(self.teacher_steps) if self.real == "teacher" else {}
        return total_calls(samples, {"teacher": 3, "student": 1, "student_backward": 1})
