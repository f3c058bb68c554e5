"""Flow matching: training of a teacher, or a reference for every student."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.losses import power_loss
from lightning_distill.flow.path import conditional_velocity, interpolate
from lightning_distill.flow.times import TimeSampler, Uniform
from lightning_distill.methods.base import Objective, TeacherStudentBase
from lightning_distill.methods.encoder import Batch
from lightning_distill.methods.evaluation import Network
from lightning_distill.methods.networks import replace_rows
from lightning_distill.teachers.model_adapter import Condition
from lightning_distill.teachers.student import make_trainable


class FlowMatching(TeacherStudentBase):
    r"""Flow matching along the linear path (arXiv 2210.02747, 2209.03003).

    .. math:: L = E \| v(x_t, t, c) - (\text{noise} - x_0) \|^2, \quad x_t = (1 - t) x_0 + t \, \text{noise}.

    It trains the adapter's network itself and has no teacher. With random weights and `train_text_encoders` it trains a teacher
    from scratch; with a checkpoint it fine-tunes one.

    Args:
        time_sampler: Distribution of t.
        caption_dropout: Share of the captions replaced by the empty prompt, in [0, 1), for two-branch guidance.
        train_text_encoders: Whether the text encoders train as well.
        **kwargs: Of `TeacherStudentBase`.

    Raises:
        ConfigurationError: If settings contradict each other.
    """

    has_teacher: ClassVar[bool] = False

    def __init__(
        self,
        *args: Any,
        time_sampler: TimeSampler = Uniform(),
        caption_dropout: float = 0.1,
        train_text_encoders: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, caption_dropout=caption_dropout, **kwargs)
        if self.guidance.kind == "improved" or self.guidance.scales is not None:
            name = "kind improved" if self.guidance.kind == "improved" else f"scales {list(self.guidance.scales or ())}"
            raise ConfigurationError(
                f"guidance.{name} distils guidance into a student, and FlowMatching trains without guidance; set kind to "
                "two_branch or, where the checkpoint takes a guidance scale, to embedded, and scale to that of validation"
            )
        if self.student_options.lora is not None:
            raise ConfigurationError("student.lora is set, and FlowMatching trains all weights; set it to null")
        if self.student_options.pretrained is not None:
            raise ConfigurationError(
                "student.pretrained is set, and FlowMatching trains the network of adapter.pretrained; set it to null"
            )
        if self.student_options.policy_points > 1:
            raise ConfigurationError(
                f"student.policy_points is {self.student_options.policy_points}, and FlowMatching has no policy; set it to 1"
            )
        if train_text_encoders and self.ema_decay is not None:
            raise ConfigurationError(
                "model.ema_decay is set, and the EMA excludes the text encoders of model.train_text_encoders; set ema_decay "
                "to null, or train_text_encoders to false"
            )
        self.time_sampler = time_sampler
        self.caption_dropout = caption_dropout
        self.encoder.trains_text_encoders = train_text_encoders

    def build_networks(self) -> None:
        """Load the adapter's network, trainable, and make the text encoders trainable if they train."""
        self.networks.student = make_trainable(self.adapter.load_teacher())
        if self.student_options.gradient_checkpointing:
            network: Any = self.student
            network.enable_gradient_checkpointing()
        if self.encoder.trains_text_encoders:
            for encoder in self.adapter.text_encoders().values():
                make_trainable(encoder)

    def build_student(self) -> nn.Module:
        """Another network like the trained one at its start."""
        return self.adapter.load_teacher()

    def trained_networks(self) -> dict[str, nn.Module]:
        """The network, and the text encoders if they train."""
        encoders = self.adapter.text_encoders() if self.encoder.trains_text_encoders else {}
        return super().trained_networks() | {f"networks.adapter.{name}": encoder for name, encoder in encoders.items()}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Drop captions, then take the step of every method."""
        keep = torch.rand(len(batch["prompt"])) >= self.caption_dropout
        prompts = [prompt if kept else "" for prompt, kept in zip(batch["prompt"], keep.tolist(), strict=True)]
        batch = {**batch, "prompt": prompts}
        if "condition" in batch:
            null = self.encoder.null_condition(len(prompts))
            batch["condition"] = replace_rows(batch["condition"], null, ~keep.to(self.device))
        return super().training_step(batch, batch_idx)

    def objective(self, x0: Tensor, condition: Condition) -> Objective:
        """Squared error of the conditional velocity."""
        t = self.time_sampler(len(x0), x0.device)
        noise = torch.randn_like(x0)
        v = self.adapter.velocity(self.student, interpolate(x0, noise, t), t, condition, self.guidance.scale)
        return Objective(power_loss(v, conditional_velocity(x0, noise), gamma=1.0), t)

    def sampling_velocity(
        self, x: Tensor, r: Tensor, t: Tensor, condition: Condition, null: Condition, network: Network
    ) -> Tensor:
        """Velocity (B, C, h, w) of the trained network under guidance, for Euler steps."""
        trained, guidance = self.networks.sampling_student, self.guidance
        return self.adapter.guided_velocity(trained, x, t, condition, null, guidance.scale, guidance.interval)
