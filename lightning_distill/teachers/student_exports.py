"""Exports of students in places where only a teacher, or its LoRA, works."""

import json
from pathlib import Path

from lightning_distill.students.lora_student import SETTINGS
from lightning_distill.teachers.pipeline_source import PipelineSource

MARK = "export.json"
"""File that identifies a directory as an export of this package, and names its kind."""
_STUDENTS = ("stock", "lora", "comfyui", "kohya", "single_file")
"""Kinds of exports of a student for some numbers of steps."""
_WHOLE = ("any_step", "stock", "teacher")
"""Kinds of exports with a transformer, whose settings say whether it has two times."""


def check_no_student(directory: Path, source: PipelineSource) -> None:
    """Check that weights are not those of a student for some numbers of steps, whose time embeddings are right at these only.

    Args:
        directory: Directory with the weights.
        source: Setting that names them.

    Raises:
        ConfigurationError: If `export.json` there names such a student, or the directory has a student without its base.
    """
    remedy = "set it to the teacher of this student, and student.pretrained to an export of the student as any_step"
    if source.setting != "adapter.pretrained":
        remedy = "leave it out, or set it to LoRA of a model of many steps"
    if (directory / SETTINGS).is_file():
        raise source.error(f"a few-step student, which has no velocities for a teacher; {remedy}")
    kind, nfe = _read(directory)
    if kind in _STUDENTS and nfe:
        steps = " or ".join(map(str, nfe))
        raise source.error(
            f"a student for {steps} step{'s' * (steps != '1')}, whose time embeddings are right at these only; {remedy}"
        )


def check_start(directory: Path, source: PipelineSource) -> None:
    """Check that an export is one that a student can start from, with a transformer of two times.

    Args:
        directory: Directory of the export.
        source: Setting that names it.

    Raises:
        ConfigurationError: If `export.json` there names an export of another kind.
    """
    kind, _ = _read(directory)
    if kind is not None and kind not in _WHOLE:
        raise source.error(
            f"an export of the kind {kind}, which has no transformer of two times; set it to an export of the student as "
            "any_step (`export --format any_step` writes one from a checkpoint), or to null to start from the teacher"
        )


def _read(directory: Path) -> tuple[str | None, list[int] | None]:
    """Kind and numbers of steps in `export.json`; None where there are none."""
    try:
        content = json.loads((directory / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no export
        return None, None
    return (content.get("kind"), content.get("nfe")) if isinstance(content, dict) else (None, None)
