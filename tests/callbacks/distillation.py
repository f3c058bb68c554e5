"""Methods small enough to train in a test: one that draws Shapes, and one whose validation follows a script."""

import copy
import random
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill.data.shapes import parse_prompt, render, sample_scene
from lightning_distill.flow.path import expand, interpolate
from lightning_distill.methods.base import Objective, TeacherStudentBase
from lightning_distill.methods.validation import ValidationOptions
from lightning_distill.metrics import PromptAccuracy
from lightning_distill.teachers.model_adapter import Condition, ModelAdapter
from lightning_distill.teachers.student_options import StudentOptions


class Painter(nn.Module):
    """Knows the picture of every prompt, and paints it with a strength: the flow is straight, one step reaches its end."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(strength))

    def forward(self, x_t: Tensor, t: Tensor, picture: Tensor) -> Tensor:
        return (x_t - self.strength * picture) / expand(t, x_t)


class PictureAdapter(ModelAdapter):
    """Latents are pixels, a prompt's condition is its picture. The student starts with a strength of its own.

    Args:
        strength: Of the student; the teacher's is 1.
    """

    embeds_guidance = False

    def __init__(self, strength: float = 0.0) -> None:
        super().__init__()
        self.strength = strength

    def check(self) -> None: ...

    def load(self, encoders: bool = True) -> None: ...

    def load_teacher(self) -> nn.Module:
        return Painter(1.0).requires_grad_(False)

    def build_student(self, teacher: nn.Module, options: StudentOptions) -> tuple[nn.Module, None]:
        student = copy.deepcopy(teacher).requires_grad_(True)
        nn.init.constant_(student.strength, self.strength)
        return student, None

    def encoding_settings(self) -> dict[str, Any]:
        return {"family": "pictures"}

    def encode_prompt(self, prompts: list[str]) -> Condition:
        scenes = [sample_scene(parse_prompt(prompt), random.Random(prompt)) for prompt in prompts if prompt]
        if not scenes:
            return {"picture": torch.zeros(len(prompts), 3, 32, 32)}
        return {"picture": render(scenes).float() / 127.5 - 1}

    def text_encoders(self) -> dict[str, nn.Module]:
        return {}

    def encode_images(self, images: Tensor) -> Tensor:
        return images

    def decode_latents(self, latents: Tensor) -> Tensor:
        return latents

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height, width

    def time_shift(self, latent_shape: tuple[int, ...]) -> float:
        return 1.0

    def save_student(self, *args: Any, **kwargs: Any) -> None: ...

    def save_teacher(self, *args: Any, **kwargs: Any) -> None: ...

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, guidance_scale: Any = None) -> Tensor:
        return network(x_t, t, condition["picture"])

    def average_velocity(
        self, student: nn.Module, x_t: Tensor, r: Tensor, t: Tensor, condition: Condition, guidance_scale: Any = None
    ) -> Tensor:
        return student(x_t, t, condition["picture"])


class PictureDistillation(TeacherStudentBase):
    """Regresses the teacher's velocity at t = 1.

    Args:
        strength: Of the student at the start.
        nfe: Validated numbers of steps.
        with_metric: Whether pictures are checked.
        **kwargs: Of `TeacherStudentBase`.
    """

    solution = "discrete"

    def __init__(self, strength: float = 0.0, nfe: tuple[int, ...] = (1, 2), with_metric: bool = True, **kwargs: Any) -> None:
        super().__init__(
            PictureAdapter(strength),
            validation=ValidationOptions(nfe=nfe, teacher_nfe=4, average_velocity=False),
            metric=PromptAccuracy() if with_metric else None,
            **kwargs,
        )
        self.save_hyperparameters("strength", "nfe", "with_metric")

    def objective(self, x0: Tensor, condition: Condition) -> Objective:
        t = torch.ones(len(x0))
        x_t = interpolate(x0, torch.randn_like(x0), t)
        teacher, student = (self.adapter.velocity(network, x_t, t, condition) for network in (self.teacher, self.student))
        return Objective((student - teacher).square().flatten(1).mean(1), t)


class PictureTraining(PictureDistillation):
    """The same without a teacher to compare with."""

    has_teacher: ClassVar[bool] = False


class Scripted(LightningModule):
    """A student of two weights whose validation logs what a script says.

    Args:
        script: The value of `val/average_velocity_error` from an optimizer step on; before the first, none is logged.
        with_ema: Whether there is an average of the student.
        solution: The solution it starts with.
    """

    def __init__(self, script: dict[int, float], with_ema: bool = False, solution: str = "discrete") -> None:
        super().__init__()
        self.script = script
        self.solution = solution
        self.student = nn.Linear(1, 1)
        self.ema = AveragedModel(self.student, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if with_ema else None
        self.solutions: list[str] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.solutions.append(self.solution)
        return self.student(batch[0]).square().mean()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update_parameters(self.student)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        values = [value for step, value in self.script.items() if step <= self.global_step]
        if values:
            self.log("val/average_velocity_error", values[-1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.student.parameters(), 0.1)


class Ones(LightningDataModule):
    """Four training batches an epoch and one for validation."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(4, 1)))

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(1, 1)))
