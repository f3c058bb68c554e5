"""Exports of students where a teacher, or the start of a student, is expected."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_distill.errors import ConfigurationError
from lightning_distill.export.mark import ExportMark
from lightning_distill.methods import MeanFlow
from lightning_distill.methods.validation import ValidationOptions
from lightning_distill.students.lora_student import SETTINGS
from lightning_distill.teachers import DiffusersAdapter
from lightning_distill.teachers.student_options import StudentOptions


def exported(teacher: str, directory: Path, *mark: Any) -> str:
    """A copy of a pipeline, marked as an export."""
    shutil.copytree(teacher, directory)
    ExportMark(*mark).write(directory)
    return str(directory)


def lora(directory: Path, *mark: Any) -> str:
    """LoRA of a layer of the tiny pipeline, marked as an export."""
    directory.mkdir()
    factors = {"transformer.proj_out.lora_A.weight": torch.ones(2, 64), "transformer.proj_out.lora_B.weight": torch.ones(64, 2)}
    save_file(factors, directory / "pytorch_lora_weights.safetensors")
    ExportMark(*mark).write(directory)
    return str(directory)


def test_a_student_for_some_steps_is_no_teacher(teacher_directory: str, tmp_path: Path) -> None:
    adapter = DiffusersAdapter(exported(teacher_directory, tmp_path / "stock", "stock", (2, 4)))
    module = MeanFlow(adapter, validation=ValidationOptions(height=16, width=16))
    with pytest.raises(ConfigurationError, match=r"adapter\.pretrained is .*stock', a student for 2 or 4 steps, .*; set it to"):
        module.setup("fit")
    DiffusersAdapter(exported(teacher_directory, tmp_path / "teacher", "teacher")).check_teacher()


def test_lora_of_a_student_for_some_steps_is_no_teacher(teacher_directory: str, tmp_path: Path) -> None:
    few, free = lora(tmp_path / "few", "lora", (1,)), lora(tmp_path / "free", "lora", None)
    adapter = DiffusersAdapter(teacher_directory, lora=few)
    adapter.check()
    with pytest.raises(ConfigurationError, match=r"adapter\.lora is .*few', a student for 1 step, .*; leave it out, or"):
        adapter.check_teacher()
    DiffusersAdapter(teacher_directory, lora=free).check_teacher()
    (tmp_path / "free" / SETTINGS).touch()
    with pytest.raises(ConfigurationError, match=r"adapter\.lora is .*free', a few-step student"):
        DiffusersAdapter(teacher_directory, lora=free).check_teacher()


@pytest.mark.parametrize("kind", ["lora", "single_file", "several", "lora_student"])
def test_a_student_does_not_start_from_an_export_without_its_transformer(
    kind: str, teacher_directory: str, tmp_path: Path
) -> None:
    adapter = DiffusersAdapter(teacher_directory)
    adapter.check()
    options = StudentOptions(pretrained=lora(tmp_path / "export", kind))
    with pytest.raises(ConfigurationError, match=rf"student\.pretrained is .*, an export of the kind {kind}, .* as any_step"):
        adapter.check_student(options)
