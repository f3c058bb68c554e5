"""Which export `sample` uses: that of a directory, or one of several exports in its subfolders, and its number of steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_distill.errors import ConfigurationError, alternatives
from lightning_distill.export.mark import MARK, ExportMark
from lightning_distill.students.lora_student import SETTINGS
from lightning_distill.teachers.pipeline_files import INDEX
from lightning_distill.teachers.pipeline_source import PipelineSource
from lightning_distill.teachers.registry import expand_pretrained

DEFAULT_NFE = 4
"""Number of steps of students for any number, and of stock pipelines."""
ON_BASE = ("lora", "comfyui", "kohya", "single_file")
"""Kinds of exports that are used with the pipeline of their base model."""
STOCK = ("stock", *ON_BASE)
"""Kinds of exports that stock pipelines load, with arguments of their own."""
PREFERENCE = ("stock", "any_step", *ON_BASE)
"""Kinds of several exports of a student, best first."""


@dataclass(frozen=True)
class Choice:
    """A pipeline, LoRA or transformer to sample with.

    Attributes:
        name: Shipped name or directory.
        mark: Its `export.json`; None for pipelines that are no exports.
    """

    name: str
    mark: ExportMark | None


def read_mark(directory: Path, source: PipelineSource) -> ExportMark | None:
    """`export.json` of a directory, or None.

    Raises:
        ConfigurationError: If it is damaged.
    """
    if not (directory / MARK).is_file():
        return None
    try:
        return ExportMark.read(directory)
    except (OSError, ValueError) as error:
        raise source.error(f"whose {MARK} cannot be read ({error}); export it again") from error


def choose_export(name: str, nfe: int | None) -> Choice:
    """The export of a directory, or the one of several in its subfolders that is for a number of steps.

    Args:
        name: `--pipeline`: a shipped name or a directory.
        nfe: Number of steps; None prefers the largest number of steps that an export is for.

    Raises:
        ConfigurationError: If none of several exports is for this number of steps, or an `export.json` is damaged.
    """
    directory, source = Path(expand_pretrained(name)), PipelineSource("--pipeline", name)
    exports = _exports(directory, source)
    if not exports:
        return Choice(name, read_mark(directory, source))
    counts = {n for mark in exports.values() for n in mark.nfe or ()}
    wanted = nfe or max(counts, default=DEFAULT_NFE)
    fitting = [path for path, mark in exports.items() if mark.nfe is None or wanted in mark.nfe]
    if not fitting:
        raise ConfigurationError(
            f"--nfe is {nfe}, but the exports in --pipeline {name!r} are for {alternatives(sorted(counts))} steps; set --nfe "
            "to one of these, or export the student as any_step"
        )
    chosen = min(fitting, key=lambda path: PREFERENCE.index(exports[path].kind))
    return Choice(str(chosen), exports[chosen])


def _exports(directory: Path, source: PipelineSource) -> Mapping[Path, ExportMark]:
    """Exports in the subfolders of a directory that is itself none."""
    if not directory.is_dir() or any((directory / file).is_file() for file in (INDEX, SETTINGS, "config.json")):
        return {}
    found = {path: read_mark(path, source) for path in sorted(directory.iterdir()) if path.is_dir()}
    return {path: mark for path, mark in found.items() if mark is not None and mark.kind in PREFERENCE}


def check_students(marks: Mapping[str, ExportMark | None], loras: int) -> None:
    """Check that there is one student at most, and as many LoRA files beside it as its teacher had merged.

    Args:
        marks: `export.json` of pipeline and LoRA by the argument that names them.
        loras: Number of `--lora`.

    Raises:
        ConfigurationError: If not.
    """
    students = {argument: mark for argument, mark in marks.items() if mark is not None and mark.kind in STOCK}
    if len(students) > 1:
        raise ConfigurationError(
            f"{' and '.join(students)} are few-step students, which do not add up; give one of them, beside LoRA of other kinds"
        )
    for argument, mark in students.items():
        beside = loras - argument.startswith("--lora")
        if beside < len(mark.base_lora):
            needed = " and ".join(f"--lora {each['path']} {each['weight']:g}" for each in mark.base_lora)
            raise ConfigurationError(f"{argument} is a student of a base with LoRA; give {needed} as well")


def steps_of(nfe: int | None, marks: Mapping[str, ExportMark | None]) -> int:
    """Number of steps: the given one, or the one that the exports are for.

    Args:
        nfe: `--nfe`, or None.
        marks: `export.json` of pipeline and LoRA by the argument that names them.

    Raises:
        ConfigurationError: If an export is for other numbers of steps.
    """
    wanted = nfe
    for argument, mark in marks.items():
        if mark is None or mark.nfe is None:
            continue
        if wanted is None:
            wanted = max(mark.nfe)
        elif wanted not in mark.nfe:
            asked = f"--nfe is {nfe}" if nfe is not None else f"another export is for {wanted} steps"
            raise ConfigurationError(
                f"{asked}, but {argument} is a student for {alternatives(mark.nfe)} step{'s' if mark.nfe != (1,) else ''}; set "
                f"--nfe to {alternatives(mark.nfe)}, or export the student for other steps"
            )
    return DEFAULT_NFE if wanted is None else wanted
