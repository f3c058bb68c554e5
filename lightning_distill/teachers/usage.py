"""Code snippets that load exports and sample from them, for model cards."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ExportCode:
    """Python code for model cards of exports; each snippet assigns an image to `image`.

    All snippets may contain the placeholder `{inputs}`, for the prompt and the settings of the image, one a line. They may
    also contain `{steps}`, `{guidance_scale}`, `{height}`, `{width}`, and `{torch_dtype}` of the teacher's weights. Those that
    need the base model may contain `{base}`, and `{base_lora}` for the code that merges the teacher's LoRA. Those of exports
    for one number of steps may contain `{file}`, `{scheduler_class}`, `{scheduler}`, which creates it, and `{network_class}`.

    Args:
        library: Library that loads the exports, under its name on the hub.
        student: Code for a student.
        teacher: Code for a teacher.
        lora_student: Code for a student for any number of steps exported without its base model.
        stock: Code for a stock pipeline of a student.
        lora: Code for LoRA weights of a student.
        single_file: Code for the transformer of a student in one file.
        merge_lora: Code that merges the teacher's LoRA `{name}` into `{pipeline}`, with `{weight}` and `{options}` of loading.
    """

    library: str
    student: str
    teacher: str
    lora_student: str = ""
    stock: str = ""
    lora: str = ""
    single_file: str = ""
    merge_lora: str = ""


_MERGE_LORA = """{pipeline}.load_lora_weights("{name}"{options})
{pipeline}.fuse_lora(lora_scale={weight:g})
{pipeline}.unload_lora_weights()
"""
_MERGE_LORA_WITHOUT_LOADER = """{pipeline}.transformer.load_lora_adapter("{name}", prefix="transformer"{options})
{pipeline}.transformer.fuse_lora(lora_scale={weight:g})
{pipeline}.transformer.unload_lora()
"""
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
_STOCK = """import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this/directory", torch_dtype=torch.{torch_dtype})
image = pipeline(
{inputs}
).images[0]
"""
_LORA = """import torch
from diffusers import DiffusionPipeline, {scheduler_class}

pipeline = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.{torch_dtype})
{base_lora}pipeline.load_lora_weights("this/directory", weight_name="{file}")
pipeline.scheduler = {scheduler}
image = pipeline(
{inputs}
).images[0]
"""
_SINGLE_FILE = """import torch
from diffusers import DiffusionPipeline, {network_class}, {scheduler_class}

transformer = {network_class}.from_single_file(
    "this/directory/{file}", config="{base}", subfolder="transformer", torch_dtype=torch.{torch_dtype}
)
pipeline = DiffusionPipeline.from_pretrained("{base}", transformer=transformer, torch_dtype=torch.{torch_dtype})
pipeline.scheduler = {scheduler}
image = pipeline(
{inputs}
).images[0]
"""
DIFFUSERS_CODE = ExportCode(
    library="diffusers",
    student=_PIPELINE.replace("{options}", ", trust_remote_code=True"),
    teacher=_PIPELINE.replace("{options}", ""),
    lora_student=_LORA_PIPELINE,
    stock=_STOCK,
    lora=_LORA,
    single_file=_SINGLE_FILE,
    merge_lora=_MERGE_LORA,
)
DIFFUSERS_CODE_WITHOUT_LOADER = replace(
    DIFFUSERS_CODE,
    lora=_LORA.replace(
        'load_lora_weights("this/directory"', 'transformer.load_lora_adapter("this/directory", prefix="transformer"'
    ),
    merge_lora=_MERGE_LORA_WITHOUT_LOADER,
)
"""Code for families whose pipeline has no `load_lora_weights`."""
