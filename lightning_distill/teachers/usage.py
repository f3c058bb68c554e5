"""Code by which exports are used, for their model cards."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExportCode:
    """Code by which exports are used, for their model cards; it leaves a picture in `image`.

    Args:
        library: That they are loaded with, as the hub names it.
        student: Python lines, with `{inputs}` for a prompt and the settings of its picture, one a line.
        teacher: Likewise; `{steps}`, `{guidance_scale}`, `{height}` and `{width}` may stand in all.
        lora_student: Of students that are exported without their base; `{base}` and its `{torch_dtype}` may stand in it.
    """

    library: str
    student: str
    teacher: str
    lora_student: str = ""


_PIPELINE = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this/directory"{options})
image = pipeline(
{inputs}
).images[0]
"""
_ON_BASE = """import sys

import torch
from diffusers import DiffusionPipeline

sys.path.append("this/directory")
from few_step_student.lora_student import load_lora_student

base = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.{torch_dtype})
pipeline = load_lora_student(base, "this/directory")
image = pipeline(
{inputs}
).images[0]
"""
DIFFUSERS_CODE = ExportCode(
    library="diffusers",
    student=_PIPELINE.replace("{options}", ", trust_remote_code=True"),
    teacher=_PIPELINE.replace("{options}", ""),
    lora_student=_ON_BASE,
)
