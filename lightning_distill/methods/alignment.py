"""Trajectory distribution alignment: the cure for the mean-seeking of one and two steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import expand, jump, predict_x0, renoise
from lightning_distill.methods.guided_networks import GuidedCondition
from lightning_distill.methods.side_training import SideTraining
from lightning_distill.models.base import LoraOptions, ModelAdapter, StudentOptions

if TYPE_CHECKING:
    from lightning_distill.methods.base import TeacherStudentBase


@dataclass(frozen=True)
class TrajectoryState:
    """Where the student's few-step trajectories have arrived.

    Attributes:
        x_s: States (B, C, h, w), differentiable through the last segment only.
        s: Their grid times (B,), below 1.
    """

    x_s: Tensor
    s: Tensor


class TrajectoryAlignment(nn.Module):
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
        critic_updates: Critic updates for each student update, at least 1.
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
        super().__init__()
        if not weight > 0:
            raise ConfigurationError(f"alignment.weight is {weight}; set it above 0, or alignment to null for none")
        if not nfe or min(nfe) < 1:
            raise ConfigurationError(f"alignment.nfe is {list(nfe)}; give numbers of steps of at least 1")
        if guidance_scale is not None and not guidance_scale >= 0:
            raise ConfigurationError(
                f"alignment.guidance_scale is {guidance_scale}; set it to 0 or more, or null for the student's"
            )
        if critic_updates < 1:
            raise ConfigurationError(f"alignment.critic_updates is {critic_updates}; the critic needs at least 1")
        if not critic_lr > 0 or not critic_clip > 0:
            raise ConfigurationError("alignment.critic_lr and alignment.critic_clip must be above 0")
        if isinstance(critic_lora, str) and critic_lora != "student":
            raise ConfigurationError(
                f"alignment.critic_lora is {critic_lora!r}; choose student, settings of its own, or null for a critic that "
                "trains as a whole"
            )
        if start_step < 0 or critic_warmup_steps < 0:
            raise ConfigurationError("alignment.start_step and alignment.critic_warmup_steps must not be negative")
        self.weight = weight
        self.nfe = tuple(nfe)
        self.guidance_scale = guidance_scale
        self.critic_updates = critic_updates
        self.start_step = start_step
        self.critic_warmup_steps = critic_warmup_steps
        self.critic_lora = critic_lora
        self.critic_training = SideTraining(critic_lr, clip=critic_clip)

    critic: nn.Module

    def critic_options(self, student: StudentOptions) -> StudentOptions:
        """How the critic is built beside a student of these options."""
        lora = student.lora if self.critic_lora == "student" else self.critic_lora
        return StudentOptions(time_embedding="original", gradient_checkpointing=student.gradient_checkpointing, lora=lora)

    def build(self, adapter: ModelAdapter, teacher: nn.Module, student: StudentOptions) -> None:
        """The critic starts as the teacher, whatever s: at first both scores agree on the teacher's own samples."""
        self.critic, _ = adapter.build_student(teacher, self.critic_options(student))

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
            critic_loss = self._update_critic(module, state, condition)
        logs = {"critic_loss": critic_loss}
        if warming_up:
            return torch.zeros(len(noise), device=noise.device), logs
        loss = self.weight * self.student_loss(module, state, condition)
        return loss, logs | {"alignment_loss": loss.detach().mean()}

    def roll_out(self, module: TeacherStudentBase, noise: Tensor, condition: GuidedCondition) -> TrajectoryState:
        """Roll the student over a grid of random length to the end of a random segment, with gradient through that only."""
        nfe = module.first_process(self.nfe[int(torch.randint(len(self.nfe), ()))])
        last = module.first_process(int(torch.randint(nfe, ())))
        grid = module.adapter.time_grid(nfe, tuple(noise.shape[1:])).to(noise.device)
        x = noise
        with_gradient = torch.is_grad_enabled()
        for k in range(last + 1):
            t, r = grid[k].expand(len(x)), grid[k + 1].expand(len(x))
            with torch.set_grad_enabled(with_gradient and k == last):
                x = jump(x, module.average_velocity(x, r, t, condition), r, t)
        return TrajectoryState(x, grid[last + 1].expand(len(x)))

    def student_loss(self, module: TeacherStudentBase, state: TrajectoryState, condition: GuidedCondition) -> Tensor:
        """The loss (B,) whose gradient at x_s is the normalised difference of the two predictions of x0."""
        with torch.no_grad():
            x_s = state.x_s.detach()
            tau, x_tau, _ = diffuse(x_s, state.s)
            prompts, scale = condition.prompts, condition.scale
            v_student = module.adapter.average_velocity(self.critic, x_tau, state.s, tau, prompts, scale)
            guidance = scale if self.guidance_scale is None else torch.full_like(scale, self.guidance_scale)
            v_teacher = module.adapter.guided_velocity(
                module.teacher, x_tau, tau, prompts, condition.null, guidance, module.guidance.interval
            )
            x0_teacher = predict_x0(x_tau, v_teacher, tau)
            gradient = predict_x0(x_tau, v_student, tau) - x0_teacher
            size = (x_s - x0_teacher).abs().flatten(1).mean(1).clamp_min(1e-3)
            goal = x_s - gradient / expand(size, x_s)
        return 0.5 * (state.x_s - goal).square().flatten(1).mean(1)

    def critic_loss(self, module: TeacherStudentBase, state: TrajectoryState, condition: GuidedCondition) -> Tensor:
        r"""Flow matching of the critic on the student's states.

        The velocity at :math:`x_\tau` with the conditional score :math:`-(x_\tau - a x_s) / b^2` is
        :math:`(\tau \, \text{noise}' / b - x_\tau) / (1 - \tau)`. The square is weighted by :math:`(1 - s)^2 b^2 / \tau^2`,
        which is 1 at s = 0, where this is plain flow matching. It keeps the target finite where tau is close to s, and the loss
        of one size for all s: the noise within :math:`x_s` is worth :math:`s / (1 - s)` in the target.
        """
        x_s = state.x_s.detach()
        tau, x_tau, noise = diffuse(x_s, state.s)
        b = diffusion_std(state.s, tau)
        target = (expand(tau / b, x_s) * noise - x_tau) / expand(1 - tau, x_s)
        v = module.adapter.average_velocity(self.critic, x_tau, state.s, tau, condition.prompts, condition.scale)
        return (((1 - state.s) * b / tau).square() * (v - target).square().flatten(1).mean(1)).mean()

    def _update_critic(self, module: TeacherStudentBase, state: TrajectoryState, condition: GuidedCondition) -> Tensor:
        optimizer = self.critic_training.optimizer(self.critic, module.sharding)
        with torch.enable_grad():
            loss = self.critic_loss(module, state, condition)
        optimizer.step(loss)
        return loss.detach()


def diffusion_std(s: Tensor, tau: Tensor) -> Tensor:
    """The b (B,) of `x_tau = a x_s + b noise`: `b^2 = tau^2 - a^2 s^2` with `a = (1 - tau) / (1 - s)`."""
    return ((tau - s) * (tau + s - 2 * tau * s)).sqrt() / (1 - s)


def diffuse(x_s: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Diffuse states on to random times between s and 1.

    Returns:
        tau (B,), x_tau (B, C, h, w) and the noise that was added.
    """
    tau = s + (1 - s) * (0.02 + 0.96 * torch.rand(len(s), device=s.device))
    noise = torch.randn_like(x_s)
    return tau, renoise(x_s, s, tau, noise), noise
