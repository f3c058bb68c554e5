"""Small methods for tests of callbacks: one that samples images of Shapes, and one with scripted validation metrics."""

import copy
import random
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill.data.shapes import parse_prompt, render, sample_scene
from lightning_distill.flow.path import expand, interpolate
from lightning_distill.methods.base import Objective, TeacherStudentBase
from lightning_distill.methods.encoder import Batch
from lightning_distill.methods.validation import ValidationOptions
from lightning_distill.metrics import PromptAccuracy
from lightning_distill.teachers.model_adapter import Condition, ModelAdapter
from lightning_distill.teachers.student_options import StudentOptions


class StraightFlow(nn.Module):
    """Velocity of straight trajectories to an image times a trainable strength; one step reaches their end."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(strength))

    def forward(self, x_t: Tensor, t: Tensor, image: Tensor) -> Tensor:
        return (x_t - self.strength * image) / expand(t, x_t)


class PixelAdapter(ModelAdapter):
    """Adapter whose latents are pixels; the condition of a prompt is an image of it.

    Args:
        strength: Initial strength of the student; the teacher's is 1.
    """

    embeds_guidance = False

    def __init__(self, strength: float = 0.0) -> None:
        super().__init__()
        self.strength = strength

    def check(self) -> None: ...

    def load(self, encoders: bool = True) -> None: ...

    def load_teacher(self) -> nn.Module:
        return StraightFlow(1.0).requires_grad_(False)

    def build_student(self, teacher: nn.Module, options: StudentOptions) -> tuple[nn.Module, None]:
        student = copy.deepcopy(teacher).requires_grad_(True)
        nn.init.constant_(student.strength, self.strength)
        return student, None

    def encoding_settings(self) -> dict[str, Any]:
        return {"family": "pixels"}

    def encode_prompt(self, prompts: list[str]) -> Condition:
        scenes = [sample_scene(parse_prompt(prompt), random.Random(prompt)) for prompt in prompts if prompt]
        if not scenes:
            return {"image": torch.zeros(len(prompts), 3, 32, 32)}
        return {"image": render(scenes).float() / 127.5 - 1}

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
        return network(x_t, t, condition["image"])

    def average_velocity(
        self, student: nn.Module, x_t: Tensor, r: Tensor, t: Tensor, condition: Condition, guidance_scale: Any = None
    ) -> Tensor:
        return student(x_t, t, condition["image"])


class PhasedMethod(TeacherStudentBase):
    """A method with the phases of MeanFlow, which have no effect.

    Args:
        adapter: Of `TeacherStudentBase`.
        phase: The phase at the start.
        **kwargs: Of `TeacherStudentBase`.
    """

    phases: ClassVar[tuple[str, ...]] = ("discrete", "bootstrapped", "differential")

    def __init__(self, adapter: ModelAdapter, phase: str = "discrete", **kwargs: Any) -> None:
        super().__init__(adapter, **kwargs)
        self._phase = phase

    @property
    def phase(self) -> str:
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        assert phase in self.phases
        self._phase = phase


class PixelDistillation(PhasedMethod):
    """Regression of the teacher's velocity at t = 1.

    Args:
        strength: Initial strength of the student.
        nfe: Validated numbers of steps.
        with_metric: Whether `PromptAccuracy` scores the images.
        **kwargs: Of `PhasedMethod`.
    """

    def __init__(self, strength: float = 0.0, nfe: tuple[int, ...] = (1, 2), with_metric: bool = True, **kwargs: Any) -> None:
        super().__init__(
            PixelAdapter(strength),
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


class PixelTraining(PixelDistillation):
    """`PixelDistillation` without a teacher to compare with."""

    has_teacher: ClassVar[bool] = False


class LinearAdapter(PixelAdapter):
    """Adapter of a linear student with a weight and a bias; the teacher has no weights."""

    def load_teacher(self) -> nn.Module:
        return nn.Identity()

    def build_student(self, teacher: nn.Module, options: StudentOptions) -> tuple[nn.Module, None]:
        return nn.Linear(1, 1), None

    def encode_prompt(self, prompts: list[str]) -> Condition:
        return {"image": torch.zeros(len(prompts), 1)}


class Scripted(PhasedMethod):
    """A method whose validation logs scripted values.

    Args:
        script: Values of `val/average_velocity_error` by the optimizer step from which they hold. Before the first of these
            steps, nothing is logged.
        with_ema: Whether the student has an EMA.
        phase: The phase at the start.

    Attributes:
        trained_phases: The phase of each training step.
    """

    def __init__(self, script: dict[int, float], with_ema: bool = False, phase: str = "discrete") -> None:
        super().__init__(
            LinearAdapter(),
            phase,
            optimizer=partial(torch.optim.Adam, lr=0.1),
            ema_decay=0.9 if with_ema else None,
            validation=ValidationOptions(average_velocity=False),
        )
        self.script = script
        self.trained_phases: list[str] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.trained_phases.append(self.phase)
        return super().training_step(batch, batch_idx)

    def objective(self, x0: Tensor, condition: Condition) -> Objective:
        return Objective(self.student(x0.flatten(1)).square().mean(1), torch.ones(len(x0)))

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        return ("val/average_velocity_error",) if self.script else ()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        values = [value for step, value in self.script.items() if step <= self.global_step]
        if values:
            self.log("val/average_velocity_error", values[-1], batch_size=1)


class Ones(LightningDataModule):
    """Latents of ones: four training batches per epoch, and one validation batch."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(samples(4))

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(samples(1))


def samples(count: int) -> list[dict[str, Any]]:
    """Samples with a latent of 1."""
    return [{"latents": torch.ones(1, 1, 1), "prompt": "", "index": i} for i in range(count)]
