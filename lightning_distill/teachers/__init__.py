"""Teacher families: one adapter file each, and the two-time students they make."""

from lightning_distill.students.lora_student import load_lora_student
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.embedded import EmbeddedFluxAdapter
from lightning_distill.teachers.hunyuan_image3.adapter import HunyuanImage3Adapter
from lightning_distill.teachers.model_adapter import Condition, ModelAdapter
from lightning_distill.teachers.registry import resolve_pretrained
from lightning_distill.teachers.shipped import load_shipped_student
from lightning_distill.teachers.smooth_time import SmoothTimeReport
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from lightning_distill.teachers.teacher_lora import TeacherLora

__all__ = [
    "Condition",
    "DiffusersAdapter",
    "EmbeddedFluxAdapter",
    "HunyuanImage3Adapter",
    "LoraOptions",
    "ModelAdapter",
    "SmoothTimeReport",
    "StudentOptions",
    "TeacherLora",
    "load_lora_student",
    "load_shipped_student",
    "resolve_pretrained",
]
