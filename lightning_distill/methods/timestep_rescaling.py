"""Timestep rescaling: distillation of the teacher into a network that receives times in [0, 1]."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import interpolate
from lightning_distill.flow.times import TimeSampler, Uniform
from lightning_distill.methods.base import Objective, TeacherStudentBase
from lightning_distill.methods.calls import total_calls
from lightning_distill.students.two_time import TwoTimeEmbedding
from lightning_distill.teachers.model_adapter import Condition


class TimestepRescaling(TeacherStudentBase):
    r"""Distillation of the teacher into the same architecture with input t in place of 1000 t (arXiv 2512.13006, 4.2.1).

    .. math:: L = \mathrm{SmoothL1}(u(x_t, t, t), \tilde v(x_t, t)), \quad x_t = (1 - t) x_0 + t \, \text{noise}.

    The derivative of such a network along t is bounded, so that continuous-time methods can train it. The network needs as many
    steps as its teacher. Another method turns it into a few-step student if `student.pretrained` names its export, with the
    same `student.time_embedding`. `student.time_embedding: smooth` needs no such stage.

    The second time input has no effect yet and does not train.

    Args:
        time_sampler: Distribution of t.
        **kwargs: Of `TeacherStudentBase`; `student.time_embedding` must be "rescaled".

    Raises:
        ConfigurationError: If the student's time embedding is another.
    """

    learns_rescaled_time: ClassVar[bool] = True

    def __init__(self, *args: Any, time_sampler: TimeSampler = Uniform(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.student_options.time_embedding != "rescaled":
            raise ConfigurationError(
                f"student.time_embedding is {self.student_options.time_embedding}, and TimestepRescaling trains students of "
                "rescaled times; set it to rescaled"
            )
        self.time_sampler = time_sampler

    def build_networks(self) -> None:
        """Build teacher and student, and freeze the student's interval input."""
        super().build_networks()
        _freeze_interval_embedders(self.student)

    def build_student(self) -> nn.Module:
        """Another network like the student at its start."""
        network = super().build_student()
        _freeze_interval_embedders(network)
        return network

    def objective(self, x0: Tensor, condition: Condition) -> Objective:
        """Regress the student's velocity onto the teacher's at the same states."""
        t = self.time_sampler(len(x0), x0.device)
        x_t = interpolate(x0, torch.randn_like(x0), t)
        guided = self.networks.guided_condition(condition)
        target = self.networks.teacher_velocity(x_t, t, guided)
        v = self.networks.average_velocity(x_t, t, t, guided)
        error = (v.detach() - target).square().sum() / target.square().sum()
        loss = smooth_l1_loss(v, target, reduction="none").flatten(1).mean(1)
        return Objective(loss, t, {"relative_error": error.sqrt()})

    def expected_calls(self, phase: str) -> dict[str, float]:
        """One velocity of each network."""
        return total_calls({"student": 1, "student_backward": 1}, self.networks.teacher_calls())


def _freeze_interval_embedders(network: nn.Module) -> None:
    for part in network.modules():
        if isinstance(part, TwoTimeEmbedding) and part.interval_embedder is not None:
            part.interval_embedder.requires_grad_(False)
