"""Teacher families: one adapter file each, and the two-time students they make."""

from lightning_distill.models.adapter import DiffusersAdapter
from lightning_distill.models.base import Condition, ModelAdapter
from lightning_distill.models.embedded import EmbeddedFluxAdapter
from lightning_distill.models.hunyuan_image3 import HunyuanImage3Adapter
from lightning_distill.models.lora_student import load_lora_student
from lightning_distill.models.registry import resolve_pretrained
from lightning_distill.models.smooth_time import SmoothTimeReport
from lightning_distill.models.student_options import LoraOptions, StudentOptions

__all__ = [
    "Condition",
    "DiffusersAdapter",
    "EmbeddedFluxAdapter",
    "HunyuanImage3Adapter",
    "LoraOptions",
    "ModelAdapter",
    "SmoothTimeReport",
    "StudentOptions",
    "load_lora_student",
    "resolve_pretrained",
]
