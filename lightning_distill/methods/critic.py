"""Matching the distributions of a student to its teacher's by a critic: what DMD2, TDM and MeanFlow's alignment share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.distribution_matching import DiffusedState, critic_loss, diffuse, matching_gradient, matching_loss
from lightning_distill.flow.path import expand, flow_step, interpolate, predict_x0
from lightning_distill.flow.times import TimeSampler, Uniform
from lightning_distill.methods.auxiliary import AuxiliaryTraining
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.sharding.shared_weights import check_sharing
from lightning_distill.teachers.model_adapter import ModelAdapter
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions

EDGE = 0.02
"""Share of the way from s on at both of its sides that states are not diffused to: targets are infinite there."""
EVENLY = Uniform(EDGE, 1 - EDGE)
"""The noise levels of DMD2's code, arXiv 2405.14867."""


@dataclass(frozen=True)
class TrajectoryState:
    """Where the student's few-step trajectories have arrived.

    Attributes:
        x_s: States (B, C, h, w), differentiable through the last step only.
        s: Their times (B,), below 1.
        end: Latest times (B,) to which they are diffused on, above s; 1 where it is not given.
    """

    x_s: Tensor
    s: Tensor
    end: Tensor | float = 1.0


def roll_out(
    module: TeacherStudentBase, noise: Tensor, condition: GuidedCondition, nfe: Sequence[int]
) -> tuple[TrajectoryState, Tensor]:
    """Roll the student as it samples, over a grid of random length to the end of a random step, with gradient through that.

    A student of stochastic sampling is at data after each step, and goes back by fresh noise before the next (the backward
    simulation of arXiv 2405.14867, section 4.5); others are at the end of a jump.

    Args:
        module: The method.
        noise: Where trajectories start (B, C, h, w).
        condition: Of the batch.
        nfe: Numbers of steps of the grids; one is drawn.

    Returns:
        The state, and the time (B,) at which its last step began.
    """
    count = module.first_process(nfe[int(torch.randint(len(nfe), ()))])
    last = module.first_process(int(torch.randint(count, ())))
    grid = module.adapter.time_grid(count, tuple(noise.shape[1:])).to(noise.device)
    x = noise
    with_gradient = torch.is_grad_enabled()
    for k in range(last + 1):
        t, r = grid[k].expand(len(x)), grid[k + 1].expand(len(x))
        end = torch.zeros_like(r) if module.stochastic_sampling else r
        with torch.set_grad_enabled(with_gradient and k == last):
            x = flow_step(x, module.average_velocity(x, end, t, condition), end, t)
        if module.stochastic_sampling and k < last:
            x = interpolate(x, torch.randn_like(x), r)
    return TrajectoryState(x, end), t


class DistributionMatching(nn.Module):
    r"""A critic :math:`v_F(x_\tau, s, \tau)` of the student's states, and the gradient that it and the teacher give them.

    The critic learns the student's score by flow matching on its states, the teacher knows the real one, and the difference of
    their predictions at :math:`x_\tau = a x_s + b \, \text{noise}'` is the gradient of a divergence (`flow.matching_gradient`).
    The critic is a network of two times that starts as the teacher: until the student is exact, states of different s have
    different distributions at the same tau, and with one score for all the gradient would not vanish where each is right.

    Args:
        guidance_scale: Guidance scale of the teacher here, at least 0; None is the one that the student learns.
        critic_updates: Critic updates for each batch, at least 1.
        critic_lr: Learning rate of the critic's AdamW.
        critic_clip: Largest norm of the critic's gradients.
        critic_lora: LoRA of the critic, on the teacher's own weights; "student": the student's, if it has one; None: the critic
            trains as a whole.
        settings: What the settings are called in sentences about them.
        time_sampler: Distribution of tau, as a share of the way from s to where states are diffused to at most; what is within
            2 % of either end is moved there.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    def __init__(
        self,
        guidance_scale: float | None,
        critic_updates: int,
        critic_lr: float,
        critic_clip: float,
        critic_lora: LoraOptions | Literal["student"] | None,
        settings: str,
        time_sampler: TimeSampler = EVENLY,
    ) -> None:
        super().__init__()
        if guidance_scale is not None and not guidance_scale >= 0:
            raise ConfigurationError(
                f"{settings}.guidance_scale is {guidance_scale}; set it to 0 or more, or null for the student's"
            )
        if critic_updates < 1:
            raise ConfigurationError(f"{settings}.critic_updates is {critic_updates}; the critic needs at least 1")
        if not critic_lr > 0 or not critic_clip > 0:
            raise ConfigurationError(f"{settings}.critic_lr and {settings}.critic_clip must be above 0")
        if isinstance(critic_lora, str) and critic_lora != "student":
            raise ConfigurationError(
                f"{settings}.critic_lora is {critic_lora!r}; choose student, settings of its own, or null for a critic that "
                "trains as a whole"
            )
        self.guidance_scale = guidance_scale
        self.critic_updates = critic_updates
        self.critic_lora = critic_lora
        self.time_sampler = time_sampler
        self.critic_training = AuxiliaryTraining(critic_lr, clip=critic_clip)

    critic: nn.Module

    def critic_options(self, student: StudentOptions) -> StudentOptions:
        """How the critic is built beside a student of these options."""
        lora = student.lora if self.critic_lora == "student" else self.critic_lora
        return StudentOptions(time_embedding="original", gradient_checkpointing=student.gradient_checkpointing, lora=lora)

    def build(self, adapter: ModelAdapter, teacher: nn.Module, student: StudentOptions) -> None:
        """The critic starts as the teacher, whatever s: at first both scores agree on the teacher's own samples."""
        self.critic, _ = adapter.build_student(teacher, self.critic_options(student))

    def diffuse(self, state: TrajectoryState) -> DiffusedState:
        """States, without their gradient, at the times at which they are compared."""
        share = self.time_sampler(len(state.s), state.s.device).clamp(EDGE, 1 - EDGE)
        return diffuse(state.x_s.detach(), state.s, state.s + (state.end - state.s) * share)

    def student_loss(
        self,
        module: TeacherStudentBase,
        state: TrajectoryState,
        condition: GuidedCondition,
        weight: Callable[[DiffusedState], Tensor] | None = None,
    ) -> Tensor:
        """The loss (B,) whose gradient at x_s is the normalised difference of the two predictions of x0.

        Args:
            module: The method.
            state: Of its student.
            condition: Of the batch.
            weight: Of each row's gradient (B,), by what it was diffused to; None is 1.
        """
        with torch.no_grad():
            x_s = state.x_s.detach()
            diffused = self.diffuse(state)
            x_tau, tau = diffused.x_tau, diffused.tau
            prompts, scale = condition.prompts, condition.scale
            v_student = module.adapter.average_velocity(self.critic, x_tau, state.s, tau, prompts, scale)
            asked = module.teacher, x_tau, tau, prompts, condition.null
            if self.guidance_scale is None:
                v_teacher = module.guidance.teacher_velocity(module.adapter, *asked, scale)
            else:
                guidance = torch.full_like(scale, self.guidance_scale)
                v_teacher = module.adapter.guided_velocity(*asked, guidance, module.guidance.interval)
            gradient = matching_gradient(x_s, predict_x0(x_tau, v_student, tau), predict_x0(x_tau, v_teacher, tau))
            if weight is not None:
                gradient = expand(weight(diffused), gradient) * gradient
        return matching_loss(state.x_s, gradient)

    def critic_loss(self, module: TeacherStudentBase, state: TrajectoryState, condition: GuidedCondition) -> Tensor:
        """Flow matching of the critic on the student's states, their mean (`flow.critic_loss`)."""
        x_s = state.x_s.detach()
        diffused = self.diffuse(state)
        v = module.adapter.average_velocity(
            self.critic, diffused.x_tau, state.s, diffused.tau, condition.prompts, condition.scale
        )
        return critic_loss(v, x_s, state.s, diffused).mean()

    def update_critic(
        self,
        module: TeacherStudentBase,
        state: TrajectoryState,
        condition: GuidedCondition,
        further: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """One step of the critic.

        Args:
            module: The method.
            state: Of its student.
            condition: Of the batch.
            further: Another loss of the critic, added to that of flow matching.

        Returns:
            The loss of flow matching.
        """
        optimizer = self.critic_training.optimizer(self.critic, module.sharding)
        with torch.enable_grad():
            loss = self.critic_loss(module, state, condition)
            whole = loss if further is None else loss + further()
        optimizer.step(whole)
        return loss.detach()


class CriticMethod(TeacherStudentBase):
    """A method whose student learns from a critic alone, so that prompts are all it needs.

    Args:
        nfe: Numbers of steps that the student learns to sample in; one is drawn for each batch, so that one listed twice is
            drawn twice as often.
        guidance_scale: As of `DistributionMatching`.
        critic_updates: Likewise; each but the last is on fresh states of the student.
        critic_lr: Likewise.
        critic_clip: Likewise.
        critic_lora: Likewise.
        time_sampler: Likewise.
        **kwargs: Of `TeacherStudentBase`.

    Raises:
        ConfigurationError: If settings are out of range or contradict each other.
    """

    learns_velocity: ClassVar[bool] = False

    def __init__(
        self,
        *args: Any,
        nfe: Sequence[int],
        guidance_scale: float | None,
        critic_updates: int,
        critic_lr: float,
        critic_clip: float,
        critic_lora: LoraOptions | Literal["student"] | None,
        time_sampler: TimeSampler = EVENLY,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not nfe or min(nfe) < 1:
            raise ConfigurationError(f"model.nfe is {list(nfe)}; give numbers of steps of at least 1")
        self.nfe = tuple(nfe)
        self.matching = DistributionMatching(
            guidance_scale, critic_updates, critic_lr, critic_clip, critic_lora, "model", time_sampler
        )

    @property
    def needs_images(self) -> bool:
        """Prompts alone will do."""
        return False

    def roll_out(self, noise: Tensor, condition: GuidedCondition) -> tuple[TrajectoryState, Tensor]:
        """A state of the student, and the time (B,) at which its last step began."""
        return roll_out(self, noise, condition, self.nfe)

    def update_critic(
        self, state: TrajectoryState, condition: GuidedCondition, further: Callable[[TrajectoryState], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """All updates of the critic for one of the student.

        Args:
            state: That the student is trained on, for the last one.
            condition: Of the batch.
            further: Another loss of the critic on a state.

        Returns:
            Scalars to log.
        """
        for left in reversed(range(self.matching.critic_updates)):
            current = state
            if left:
                with torch.no_grad():
                    current, _ = self.roll_out(torch.randn_like(state.x_s), condition)
            bound = None if further is None else (lambda current=current: further(current))
            loss = self.matching.update_critic(self, current, condition, bound)
        return {"critic_loss": loss}

    # Networks

    def setup(self, stage: str) -> None:
        """Refuse settings that cannot work, the critic's among them."""
        super().setup(stage)
        self.check_student(self.matching.critic_options(self.student_options))

    def on_fit_start(self) -> None:
        """As in every method; the critic's base must be the teacher's as well."""
        super().on_fit_start()
        if self.matching.critic_options(self.student_options).lora is not None:
            check_sharing(self.matching.critic, self.teacher)

    def build_networks(self) -> None:
        """Teacher, student and critic."""
        super().build_networks()
        self.matching.build(self.adapter, self.teacher, self.student_options)

    def auxiliary_trainings(self) -> dict[str, AuxiliaryTraining]:
        """The critic's."""
        return {"matching.critic": self.matching.critic_training}
