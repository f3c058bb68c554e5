"""A teacher family whose flow is known in closed form, for tests of methods that take milliseconds."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.teachers.model_adapter import Condition, ModelAdapter
from lightning_distill.teachers.smooth_time import SmoothTimeReport
from lightning_distill.teachers.student_options import StudentOptions
from tests.gaussian import GaussianTeacher

GAUSSIAN = GaussianTeacher()


class ExactTeacher(nn.Module):
    """The velocity of Gaussian data plus the caption's value, so that guidance has an effect, and an offset of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, x: Tensor, r: Tensor | None, t: Tensor, caption: Tensor) -> Tensor:
        return GAUSSIAN.velocity(x, t) + self.offset + caption[:, None, None, None]


class ExactStudent(nn.Module):
    """The average velocity of Gaussian data plus the caption's value and a trainable constant, which starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, r: Tensor | None, t: Tensor, caption: Tensor) -> Tensor:
        end = t if r is None else r
        return GAUSSIAN.average_velocity(x, end, t) + self.bias + caption[:, None, None, None]


class SmallNetwork(nn.Module):
    """A network of x, r, t and the caption with random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))

    def forward(self, x: Tensor, r: Tensor | None, t: Tensor, caption: Tensor) -> Tensor:
        end = t if r is None else r
        rest = torch.stack([end, t, caption], -1)[:, None, None].expand(*x.shape[:1], *x.shape[2:], 3)
        return self.layers(torch.cat([x.movedim(1, -1), rest.to(x.dtype)], -1)).movedim(-1, 1)


class GaussianAdapter(ModelAdapter):
    """Images are their own latents; the value of a caption is its length / 100, so that the empty caption has the value 0.

    Args:
        student: Network of students: "exact" or "small".
        teacher: Network of the teacher: "exact" or "small".
    """

    def __init__(self, student: str = "exact", teacher: str = "exact") -> None:
        super().__init__()
        self.kinds = {"student": student, "teacher": teacher}

    def check(self) -> None:
        self.embeds_guidance = False

    def load(self, encoders: bool = True) -> None:
        pass

    def load_teacher(self) -> nn.Module:
        network = ExactTeacher() if self.kinds["teacher"] == "exact" else SmallNetwork()
        return network.requires_grad_(False).eval()

    def build_student(self, teacher: nn.Module, options: StudentOptions) -> tuple[nn.Module, SmoothTimeReport | None]:
        return (ExactStudent() if self.kinds["student"] == "exact" else SmallNetwork()), None

    def text_encoders(self) -> dict[str, nn.Module]:
        return {}

    def encoding_settings(self) -> dict[str, Any]:
        return {"family": "gaussian"}

    def encode_prompt(self, prompts: list[str]) -> Condition:
        return {"caption": torch.tensor([len(prompt) / 100 for prompt in prompts])}

    def encode_images(self, images: Tensor) -> Tensor:
        return images

    def decode_latents(self, latents: Tensor) -> Tensor:
        return latents

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height, width

    def time_shift(self, latent_shape: tuple[int, ...]) -> float:
        return 1.0

    def velocity(self, network, x_t, t, condition, guidance_scale=None) -> Tensor:  # type: ignore[no-untyped-def]
        return network(x_t, None, t, condition["caption"])

    def average_velocity(self, student, x_t, r, t, condition, guidance_scale=None) -> Tensor:  # type: ignore[no-untyped-def]
        return student(x_t, r, t, condition["caption"])

    def feature_widths(self, layers=None) -> dict[int, int]:  # type: ignore[no-untyped-def]
        return dict.fromkeys(layers or (0,), 6)

    def features(self, network, x_t, r, t, condition, layers, guidance_scale=None) -> list[Tensor]:  # type: ignore[no-untyped-def]
        """One token per pixel: its state and its velocity."""
        tokens = torch.cat([x_t, network(x_t, r, t, condition["caption"])], 1).flatten(2).transpose(1, 2)
        return [tokens] * len(layers)

    def save_student(self, student: nn.Module, directory: Path) -> None:
        torch.save(student.state_dict(), directory / "student.pt")

    def save_teacher(self, network: nn.Module, directory: Path) -> None:
        torch.save(network.state_dict(), directory / "teacher.pt")


class AnyStudentAdapter(GaussianAdapter):
    """Builds students of all options; their policies have a constant velocity over a step."""

    def check_student(self, options: StudentOptions) -> None: ...

    def build_student(self, teacher: nn.Module, options: StudentOptions) -> tuple[nn.Module, SmoothTimeReport | None]:
        self.policy_points = options.policy_points
        return super().build_student(teacher, options)

    def policy(self, student, x_t, r, t, condition, guidance_scale=None) -> Tensor:  # type: ignore[no-untyped-def]
        u = student(x_t, r, t, condition["caption"])
        return u[:, None].expand(-1, self.policy_points, -1, -1, -1)
