"""Distribution matching by a critic, as in DMD2, TDM and MeanFlow's alignment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.distribution_matching import DiffusedState, critic_loss, diffuse, matching_gradient, matching_loss
from lightning_distill.flow.path import expand, flow_step, interpolate, predict_x0
from lightning_distill.flow.times import TimeSampler, Uniform
from lightning_distill.methods.auxiliary import AuxiliaryLoss, AuxiliaryTraining
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.methods.calls import mean_rolled_steps
from lightning_distill.methods.networks import GuidedCondition, Networks
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions

EDGE = 0.02
"""Share of the way from s to the latest time that noise levels stay away from both ends: targets are infinite there."""
EVENLY = Uniform(EDGE, 1 - EDGE)
"""The noise levels of DMD2's code, arXiv 2405.14867."""


@dataclass(frozen=True)
class TrajectoryState:
    """States at the end of the student's rolled-out trajectories.

    Attributes:
        x_s: States (B, C, h, w), differentiable through the last step only.
        s: Times of the states (B,), below 1.
        end: Latest times (B,) to which they are diffused, above s; 1 by default.
    """

    x_s: Tensor
    s: Tensor
    end: Tensor | float = 1.0


def roll_out(
    networks: Networks, noise: Tensor, condition: GuidedCondition, nfe: Sequence[int]
) -> tuple[TrajectoryState, Tensor]:
    """Roll out the student over a few-step grid to the end of a random step, with gradient through that step.

    After each step, a student of stochastic sampling has predicted x0 and re-noises it before the next (backward simulation,
    arXiv 2405.14867, section 4.5); other students are at the end of the step.

    Args:
        networks: Networks of the method.
        noise: Start of the trajectories (B, C, h, w).
        condition: Condition of the batch.
        nfe: Numbers of steps of the grids; one is sampled.

    Returns:
        The state, and the time (B,) at which its last step began.
    """
    count = networks.first_process(nfe[int(torch.randint(len(nfe), ()))])
    last = networks.first_process(int(torch.randint(count, ())))
    grid = networks.time_grid(count, noise)
    x = noise
    with_gradient = torch.is_grad_enabled()
    for k in range(last + 1):
        t, r = grid[k].expand(len(x)), grid[k + 1].expand(len(x))
        end = torch.zeros_like(r) if networks.stochastic_sampling else r
        with torch.set_grad_enabled(with_gradient and k == last):
            x = flow_step(x, networks.average_velocity(x, end, t, condition), end, t)
        if networks.stochastic_sampling and k < last:
            x = interpolate(x, torch.randn_like(x), r)
    return TrajectoryState(x, end), t


class DistributionMatching(nn.Module):
    r"""A critic :math:`v_F(x_\tau, s, \tau)` of the student's states, and the gradient of its difference from the teacher.

    The critic learns the student's score by flow matching on its states; the teacher knows the real score. The difference of
    their predictions of x0 at :math:`x_\tau = a x_s + b \, \text{noise}'` is the gradient of a divergence
    (`flow.matching_gradient`). The critic is a two-time network that starts as the teacher. Until the student is exact, states
    of different s have different distributions at the same tau; with one score for all, the gradient would not vanish where
    each is right.

    Args:
        guidance_scale: Guidance scale of the teacher here, at least 0; None is the scale that the student learns.
        critic_updates: Critic updates for each batch, at least 1.
        critic_lora: LoRA of the critic on the teacher's weights; "student": the student's LoRA options, if it has any; None:
            all weights of the critic train.
        settings: Prefix of the settings in error messages.
        time_sampler: Distribution of tau, as a share of the way from s to the latest time, clamped to [0.02, 0.98].

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    critic: nn.Module

    def __init__(
        self,
        guidance_scale: float | None,
        critic_updates: int,
        critic_lora: LoraOptions | Literal["student"] | None,
        settings: str,
        time_sampler: TimeSampler = EVENLY,
    ) -> None:
        super().__init__()
        if guidance_scale is not None and not guidance_scale >= 0:
            raise ConfigurationError(
                f"{settings}.guidance_scale is {guidance_scale}; set it to 0 or more, or null for the student's scale"
            )
        if critic_updates < 1:
            raise ConfigurationError(f"{settings}.critic_updates is {critic_updates}; set it to at least 1")
        if isinstance(critic_lora, str) and critic_lora != "student":
            raise ConfigurationError(
                f"{settings}.critic_lora is {critic_lora!r}; choose student, LoRA options, or null to train all weights of the "
                "critic"
            )
        self.guidance_scale = guidance_scale
        self.critic_updates = critic_updates
        self.critic_lora = critic_lora
        self.time_sampler = time_sampler

    def critic_options(self, student: StudentOptions) -> StudentOptions:
        """Options of the critic beside a student of these options."""
        lora = student.lora if self.critic_lora == "student" else self.critic_lora
        return StudentOptions(time_embedding="original", gradient_checkpointing=student.gradient_checkpointing, lora=lora)

    def diffuse(self, state: TrajectoryState) -> DiffusedState:
        """The states, detached, diffused to sampled noise levels."""
        share = self.time_sampler(len(state.s), state.s.device).clamp(EDGE, 1 - EDGE)
        return diffuse(state.x_s.detach(), state.s, state.s + (state.end - state.s) * share)

    def student_loss(
        self,
        networks: Networks,
        state: TrajectoryState,
        condition: GuidedCondition,
        weight: Callable[[DiffusedState], Tensor] | None = None,
    ) -> Tensor:
        """The student's loss (B,); its gradient at x_s is the normalised difference of the two predictions of x0.

        Args:
            networks: Networks of the method.
            state: State of its student.
            condition: Condition of the batch.
            weight: Function from the diffused states to a weight of each row's gradient (B,); None is 1.
        """
        with torch.no_grad():
            x_s = state.x_s.detach()
            diffused = self.diffuse(state)
            x_tau, tau = diffused.x_tau, diffused.tau
            v_student = self._critic_velocity(networks, state, diffused, condition)
            if self.guidance_scale is None:
                v_teacher = networks.teacher_velocity(x_tau, tau, condition, student_mix=False)
            else:
                scale = torch.full((len(tau),), self.guidance_scale, device=tau.device)
                inputs = networks.teacher, x_tau, tau, condition.prompts, condition.null
                v_teacher = networks.adapter.guided_velocity(*inputs, scale, networks.guidance.interval)
            gradient = matching_gradient(x_s, predict_x0(x_tau, v_student, tau), predict_x0(x_tau, v_teacher, tau))
            if weight is not None:
                gradient = expand(weight(diffused), gradient) * gradient
        return matching_loss(state.x_s, gradient)

    def critic_loss(self, networks: Networks, state: TrajectoryState, condition: GuidedCondition) -> Tensor:
        """Mean flow-matching loss of the critic on the student's states (`flow.critic_loss`)."""
        diffused = self.diffuse(state)
        v = self._critic_velocity(networks, state, diffused, condition)
        return critic_loss(v, state.x_s.detach(), state.s, diffused).mean()

    def _critic_velocity(
        self, networks: Networks, state: TrajectoryState, diffused: DiffusedState, condition: GuidedCondition
    ) -> Tensor:
        return networks.adapter.average_velocity(
            self.critic, diffused.x_tau, state.s, diffused.tau, condition.prompts, condition.scale
        )


def critic_training(lr: float, clip: float, settings: str) -> AuxiliaryTraining:
    """Training of a critic.

    Args:
        lr: Learning rate of its AdamW.
        clip: Largest norm of its gradients.
        settings: Prefix of the settings in error messages.

    Raises:
        ConfigurationError: If one of them is not above 0.
    """
    if not lr > 0 or not clip > 0:
        raise ConfigurationError(f"{settings}.critic_lr is {lr} and {settings}.critic_clip is {clip}; set both above 0")
    return AuxiliaryTraining(lr, clip=clip)


class CriticMethod(TeacherStudentBase):
    """Base of methods whose student learns from a critic alone, so that prompts suffice as data.

    Args:
        nfe: Numbers of steps that the student learns to sample in; each batch samples one, so that one listed twice is sampled
            twice as often.
        guidance_scale: Guidance scale of the teacher's score, at least 0; None is the scale that the student learns.
        critic_updates: Critic updates for each batch, at least 1; each but the last is on fresh states of the student.
        critic_lr: Learning rate of the critic's AdamW.
        critic_clip: Largest norm of the critic's gradients.
        critic_lora: LoRA of the critic on the teacher's weights; "student": the student's LoRA options, if it has any; None:
            all weights of the critic train.
        time_sampler: Distribution of tau, as in `DistributionMatching`.
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
        self.matching = DistributionMatching(guidance_scale, critic_updates, critic_lora, "model", time_sampler)
        self.auxiliary.add("matching.critic", critic_training(critic_lr, critic_clip, "model"))

    @property
    def needs_images(self) -> bool:
        """False: prompts suffice."""
        return False

    def auxiliary_students(self) -> dict[str, StudentOptions]:
        """Options of the critic."""
        return {"matching.critic": self.matching.critic_options(self.student_options)}

    def roll_out(self, noise: Tensor, condition: GuidedCondition) -> tuple[TrajectoryState, Tensor]:
        """A state of the student, and the time (B,) at which its last step began."""
        return roll_out(self.networks, noise, condition, self.nfe)

    def critic_states(self, state: TrajectoryState, condition: GuidedCondition) -> Iterator[TrajectoryState]:
        """States of the critic's updates for one of the student: fresh ones, and last the state that the student trains on."""
        for _ in range(self.matching.critic_updates - 1):
            with torch.no_grad():
                fresh, _ = self.roll_out(torch.randn_like(state.x_s), condition)
            yield fresh
        yield state

    def critic_losses(self, state: TrajectoryState, condition: GuidedCondition) -> Iterator[AuxiliaryLoss]:
        """The critic's losses for one update of the student."""
        for current in self.critic_states(state, condition):
            yield AuxiliaryLoss("matching.critic", self.matching.critic_loss(self.networks, current, condition))

    def fix_random_choices(self) -> None:
        """Roll out one step, and update the critic once."""
        super().fix_random_choices()
        self.nfe = (1,)
        self.matching.critic_updates = 1

    def expected_calls(self, phase: str) -> dict[str, float]:
        """The student rolls out for each critic update; the critic trains on each state and scores the last."""
        updates = self.matching.critic_updates
        return {
            "student": updates * mean_rolled_steps(self.nfe),
            "student_backward": 1,
            "teacher": 1,
            "critic": updates + 1,
            "critic_backward": updates,
        }
