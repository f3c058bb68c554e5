"""Flow matching: training a teacher, or the yardstick for every student."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.losses import power_loss
from lightning_distill.flow.path import conditional_velocity, interpolate
from lightning_distill.flow.times import TimeSampler, Uniform
from lightning_distill.methods.base import Objective, TeacherStudentBase
from lightning_distill.methods.condition import replace_rows
from lightning_distill.methods.evaluation import Batch
from lightning_distill.teachers.model_adapter import Condition
from lightning_distill.teachers.student import make_trainable


class FlowMatching(TeacherStudentBase):
    r"""Flow matching along the linear path (arXiv 2210.02747, 2209.03003).

    .. math:: L = E \| v(x_t, t, c) - (\text{noise} - x_0) \|^2, \quad x_t = (1 - t) x_0 + t \, \text{noise}.

    It trains the adapter's network itself and has no teacher. With random weights and `train_text_encoders` it makes a
    teacher from nothing; with a checkpoint it fine-tunes one.

    Args:
        time_sampler: Distribution of t.
        caption_dropout: Share of the captions replaced by the empty prompt, in [0, 1), so that two-branch guidance works.
        train_text_encoders: Whether the text encoders train along.
        **kwargs: Of `TeacherStudentBase`.
    """

    has_teacher: ClassVar[bool] = False
    # `networks` holds the student, and the text encoders that train: each is saved once, from there
    frozen_prefixes: ClassVar[tuple[str, ...]] = ("student.", "adapter.", "metrics.")

    networks: nn.ModuleDict

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
                f"guidance.{name} is how a student learns guidance, and FlowMatching trains without; set kind to two_branch "
                "or, where the checkpoint takes a guidance scale, to embedded, and scale to that of validation"
            )
        if self.student_options.lora is not None:
            raise ConfigurationError("student.lora is set, and FlowMatching trains the whole network; set it to null")
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
                "model.ema_decay averages the network and not the text encoders that train beside it; set ema_decay to null, "
                "or train_text_encoders to false"
            )
        self.time_sampler = time_sampler
        self.train_text_encoders = train_text_encoders

    def build_networks(self) -> None:
        """The adapter's network, trainable, and the text encoders beside it if they train along."""
        self.student = make_trainable(self.adapter.load_teacher())
        if self.student_options.gradient_checkpointing:
            network: Any = self.student
            network.enable_gradient_checkpointing()
        self.networks = nn.ModuleDict({"transformer": self.student})
        if self.train_text_encoders:
            self.networks.update({name: make_trainable(part) for name, part in self.adapter.text_encoders().items()})

    def build_trained(self) -> nn.Module:
        """A network like `trained` at its start."""
        return nn.ModuleDict({"transformer": self.adapter.load_teacher()})

    @property
    def trained(self) -> nn.Module:
        """The network, and the text encoders if they train along."""
        return self.networks

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Drop captions, then as in every method."""
        keep = torch.rand(len(batch["prompt"])) >= self.caption_dropout
        prompts = [prompt if kept else "" for prompt, kept in zip(batch["prompt"], keep.tolist(), strict=True)]
        batch = {**batch, "prompt": prompts}
        if "condition" in batch:
            null = self.null_condition(len(prompts))
            batch["condition"] = replace_rows(batch["condition"], null, ~keep.to(self.device))
        return super().training_step(batch, batch_idx)

    def objective(self, x0: Tensor, condition: Condition) -> Objective:
        """The squared error of the conditional velocity."""
        t = self.time_sampler(len(x0), x0.device)
        noise = torch.randn_like(x0)
        v = self.adapter.velocity(self.student, interpolate(x0, noise, t), t, condition, self.guidance.scale)
        return Objective(power_loss(v, conditional_velocity(x0, noise), gamma=1.0), t)

    def sampling_velocity(
        self, x: Tensor, r: Tensor, t: Tensor, condition: Condition, null: Condition, network: Literal["student", "teacher"]
    ) -> Tensor:
        """The trained network under guidance: Euler steps."""
        transformer = self.sampling_student.get_submodule("transformer")
        return self.adapter.guided_velocity(transformer, x, t, condition, null, self.guidance.scale, self.guidance.interval)
