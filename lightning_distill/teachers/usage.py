"""Code snippets that load exports and sample from them, for model cards."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExportCode:
    """Python code for model cards of exports; each snippet assigns an image to `image`.

    All snippets may contain the placeholder `{inputs}`, for the prompt and the settings of the image, one a line. They may
    also contain `{steps}`, `{guidance_scale}`, `{height}` and `{width}`.

    Args:
        library: Library that loads the exports, under its name on the hub.
        student: Code for a student.
        teacher: Code for a teacher.
        lora_student: Code for a student exported without its base model. It may also contain `{base}` and the base model's
            `{torch_dtype}`, and `{base_lora}` for the code that merges the teacher's LoRA.
    """

    library: str
    student: str
    teacher: str
    lora_student: str = ""


MERGE_LORA = """base.load_lora_weights("{name}"{options})
base.fuse_lora(lora_scale={weight:g})
base.unload_lora_weights()
"""
"""Code that merges LoRA into a pipeline of diffusers."""
_PIPELINE = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this/directory"{options})
image = pipeline(
{inputs}
).images[0]
"""
_LORA_PIPELINE = """import sys

import torch
from diffusers import DiffusionPipeline

sys.path.append("this/directory")
from few_step_student.lora_student import load_lora_student

base = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.{torch_dtype})
{base_lora}pipeline = load_lora_student(base, "this/directory")
image = pipeline(
{inputs}
).images[0]
"""
DIFFUSERS_CODE = ExportCode(
    library="diffusers",
    student=_PIPELINE.replace("{options}", ", trust_remote_code=True"),
    teacher=_PIPELINE.replace("{options}", ""),
    lora_student=_LORA_PIPELINE,
)
