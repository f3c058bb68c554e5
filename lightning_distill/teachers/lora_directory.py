"""Write directories of LoRA students: trained weights without the base model, and the code that combines them."""

import inspect
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from diffusers.utils.dynamic_modules_utils import get_relative_import_files
from safetensors.torch import save_file

from lightning_distill.students import lora_student
from lightning_distill.students.few_step import FewStepPipeline
from lightning_distill.students.lora_student import (
    ADAPTER,
    LORA_WEIGHTS,
    PREFIX,
    SETTINGS,
    TIME_WEIGHTS,
    base_sample,
    lora_layers,
    lora_weights,
    time_weights,
)
from lightning_distill.students.two_time import TwoTimeModel
from lightning_distill.teachers.teacher_lora import TeacherLora

CODE = "few_step_student"
"""Folder of the code, a package that users import from the directory."""
SAMPLED_LAYERS = 8
"""Number of base layers with stored sample weights, by which loading detects a different base model."""


def save_lora_student(
    pipeline: FewStepPipeline,
    student: TwoTimeModel,
    max_sequence_length: int,
    stochastic_sampling: bool,
    base_model: str,
    base_lora: Sequence[TeacherLora],
    directory: Path,
) -> None:
    """Write a LoRA student without its base model, for `load_lora_student`.

    Args:
        pipeline: Pipeline of the teacher.
        student: A network of the pipeline's `network_class` with LoRA.
        max_sequence_length: Number of tokens to which training padded prompts.
        stochastic_sampling: Whether each step predicts x0 and re-noises.
        base_model: Hub id, shipped name or directory of the teacher. Only the last part of a directory is written.
        base_lora: LoRA that is merged into the teacher.
        directory: Output directory; created if it does not exist.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lora = {f"{PREFIX}{name}": value.contiguous() for name, value in lora_weights(student).items()}
    save_file(lora, directory / LORA_WEIGHTS, {"format": "pt"})
    save_file({name: value.contiguous() for name, value in time_weights(student).items()}, directory / TIME_WEIGHTS)
    student.peft_config[ADAPTER].save_pretrained(str(directory))
    source = Path(inspect.getfile(type(pipeline)))
    layers = list(lora_layers(student))
    layers = layers[:: math.ceil(len(layers) / SAMPLED_LAYERS)]
    settings = {
        "base_model": Path(base_model).name if Path(base_model).exists() else base_model,
        "base_lora": [{"path": each.name, "weight": each.weight} for each in base_lora],
        "pipeline": [source.stem, type(pipeline).__name__],
        "max_sequence_length": max_sequence_length,
        "stochastic_sampling": stochastic_sampling,
        "base_sample": {"layers": layers, "weights": base_sample(student, layers)},
        "transformer": {name: value for name, value in student.config.items() if not name.startswith("_")},
    }
    (directory / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    folder = directory / CODE
    folder.mkdir(exist_ok=True)
    for file in (source, Path(lora_student.__file__)):
        for each in (file, *map(Path, get_relative_import_files(file))):
            shutil.copyfile(each, folder / each.name)
