"""Trained networks as directories that their libraries load, with a model card."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import diffusers
from safetensors import safe_open
from torch import Tensor, nn

from lightning_distill import __version__
from lightning_distill.errors import ConfigurationError
from lightning_distill.students.lora_student import PREFIX, lora_layers, lora_weights, time_weights
from lightning_distill.teachers.families import two_time
from lightning_distill.teachers.model_adapter import ModelAdapter
from lightning_distill.teachers.usage import DIFFUSERS_CODE, ExportCode

MARK = "export.json"
"""File that tells a directory written by this module from any other."""


@dataclass(frozen=True)
class ModelCard:
    """What the README of an exported pipeline says.

    Args:
        method: Name of the method that trained the network.
        teacher: Name, directory or hub id of the teacher; of the starting weights where there was none.
        nfe: Numbers of steps the network was validated at.
        height: Height of its pictures in pixels.
        width: Width of its pictures in pixels.
        guidance_scale: Guidance scale that was distilled in, or that a teacher was validated under.
        steps: Optimizer steps of the training.
        minutes: Time the training took.
        figures: Measured figures by name, such as "val/prompt_accuracy/nfe_4".
        notes: Further paragraphs, in Markdown.
        torch_dtype: Precision of the teacher's weights, which a LoRA student draws with.
        started_from: Name, directory or hub id of the student whose weights this one started with, if it was not its teacher's.
    """

    method: str
    teacher: str
    nfe: Sequence[int]
    height: int
    width: int
    guidance_scale: float = 1.0
    steps: int | None = None
    minutes: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    notes: str = ""
    torch_dtype: str = "float32"
    started_from: str | None = None


def export_student(
    adapter: ModelAdapter,
    student: nn.Module,
    directory: str | Path,
    card: ModelCard,
    lora: Literal["merged", "unmerged"] = "merged",
) -> Path:
    """Write a student as a pipeline that draws in a few steps, with the code that it needs.

    It loads in any process that has diffusers, by `DiffusionPipeline.from_pretrained(directory, trust_remote_code=True)`; what
    is no pipeline of diffusers, by what its model card says.

    Args:
        adapter: The student's family, loaded.
        student: A two-time network.
        directory: Where to. An earlier export there is replaced.
        card: What the README says.
        lora: Of a student with LoRA: "merged" computes its weights in float32, which takes a copy of the whole network in the
            memory of the CPU. "unmerged" writes only what has trained, which `load_lora_student` puts on its base.

    Returns:
        The directory.

    Raises:
        ConfigurationError: If the directory holds anything but an earlier export, or an unmerged student has no LoRA.
    """
    if lora == "merged":
        check_export_directory(directory)
        whole = adapter.merge_lora(student)
        return _export(adapter, directory, "student", whole.state_dict(), card, lambda path: adapter.save_student(whole, path))
    if not lora_layers(student):
        raise ConfigurationError("this student has no LoRA to export unmerged; export it merged, which is as it is")
    network = two_time(student)
    own = {f"{PREFIX}{name}": value for name, value in lora_weights(network).items()} | time_weights(network)
    return _export(adapter, directory, "lora_student", own, card, lambda path: adapter.save_lora(student, path))


def export_teacher(adapter: ModelAdapter, network: nn.Module, directory: str | Path, card: ModelCard) -> Path:
    """Write a network of one time as a stock pipeline of its family, that diffusers loads without further code.

    Args:
        adapter: The network's family, loaded; its text encoders and autoencoder are written beside the network.
        network: A network without an interval input.
        directory: Where to. An earlier export there is replaced.
        card: What the README says.

    Returns:
        The directory.

    Raises:
        ConfigurationError: If the directory holds anything but an earlier export.
    """
    return _export(adapter, directory, "teacher", network.state_dict(), card, lambda path: adapter.save_teacher(network, path))


def check_export_directory(directory: str | Path) -> Path:
    """Refuse a directory whose contents an export would destroy.

    Raises:
        ConfigurationError: If the directory holds anything but an earlier export.
    """
    directory = Path(directory)
    occupied = any(directory.iterdir()) if directory.is_dir() else directory.exists()
    if occupied and not (directory / MARK).is_file():
        raise ConfigurationError(
            f"the export directory {str(directory)!r} holds something other than an earlier export; "
            "choose another directory, or empty it"
        )
    return directory


def _export(
    adapter: ModelAdapter,
    directory: str | Path,
    kind: str,
    weights: Mapping[str, Tensor],
    card: ModelCard,
    save: Callable[[Path], None],
) -> Path:
    """Write beside the target, check, and rename: the target is the old export or the whole new one, never a part."""
    target = check_export_directory(directory).absolute()
    unfinished, replaced = (target.with_name(f".{target.name}.{state}") for state in ("unfinished", "replaced"))
    for leftover in (unfinished, replaced):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save(unfinished)
    own = {"guidance_scale": card.guidance_scale} if adapter.embeds_guidance else {}
    arguments = adapter.stock_arguments(card.guidance_scale) if kind == "teacher" else own
    (unfinished / "README.md").write_text(render_card(card, kind, arguments, adapter.export_code))
    (unfinished / MARK).write_text(json.dumps({"kind": kind, "lightning_distill": __version__, "method": card.method}) + "\n")
    _check_weights(unfinished, weights)
    for path in (*unfinished.rglob("*"), unfinished):
        _sync(path)
    if target.exists():
        os.replace(target, replaced)  # a directory that is not empty cannot be replaced in one go
    os.replace(unfinished, target)
    _sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def _check_weights(directory: Path, weights: Mapping[str, Tensor]) -> None:
    """Make sure that one component, or the directory itself, holds the weights; headers of files are read, not weights."""
    expected = {(name, *value.shape) for name, value in weights.items()}
    for component in (directory, *(path for path in directory.iterdir() if path.is_dir())):
        if _shapes(component.glob("*.safetensors")) >= expected:
            return
    raise RuntimeError(f"the export in {directory} does not hold the network's weights; it was left there to be looked at")


def _shapes(files: Iterable[Path]) -> set[tuple[object, ...]]:
    found: set[tuple[object, ...]] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            found |= {(name, *tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return found


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # else a power cut could leave the new name with old or empty contents
    finally:
        os.close(descriptor)


def render_card(card: ModelCard, kind: str, arguments: Mapping[str, object], code: ExportCode = DIFFUSERS_CODE) -> str:
    """The README of an export in Markdown, with the metadata that the hub reads.

    Args:
        card: What it says.
        kind: "student", "lora_student" or "teacher".
        arguments: Of the pipeline, besides prompt, steps and size.
        code: How it is used.
    """
    student = kind != "teacher"
    base = [] if Path(card.teacher).exists() or "/" not in card.teacher else [f"base_model: {card.teacher}"]
    facts = {
        "Method": card.method,
        "Teacher" if student else "Started from": _name(card.teacher),
        **({} if card.started_from is None else {"Started from": _name(card.started_from)}),
        "Pictures": f"{card.height} x {card.width} pixels",
        "Guidance scale": f"{card.guidance_scale:g}",
        "Training steps": card.steps,
        "Training time": None if card.minutes is None else f"{card.minutes:.1f} minutes",
    }
    title = "Few-step student" if student else "Flow-matching teacher"
    lines = [
        "---",
        f"library_name: {code.library}",
        "pipeline_tag: text-to-image",
        *base,
        "tags: [lightning-distill]",
        "---",
        "",
    ]
    lines += [f"# {title}", "", _ABOUT[kind].format(steps=_listed(card.nfe), library=code.library), ""]
    steps = max(card.nfe) if student else 32
    inputs = [
        '"a prompt"' if student else 'prompt="a prompt"',
        *(f"{name}={json.dumps(value) if isinstance(value, str) else value}" for name, value in arguments.items()),
        f"num_inference_steps={steps}",
        f"height={card.height}",
        f"width={card.width}",
    ]
    example = {"student": code.student, "lora_student": code.lora_student, "teacher": code.teacher}[kind].format(
        base=_name(card.teacher),
        torch_dtype=card.torch_dtype,
        inputs="\n".join(f"    {each}," for each in inputs),
        steps=steps,
        guidance_scale=card.guidance_scale,
        height=card.height,
        width=card.width,
    )
    lines += ["```python", example.rstrip(), "```", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items() if value is not None)]
    if card.figures:
        lines += ["", "## Measured", "", "| | |", "|---|---:|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in sorted(card.figures.items())]
    lines += ["", card.notes] if card.notes else []
    lines += ["", "The weights derive from the teacher's, whose license applies to them."] if student else []
    return "\n".join([*lines, "", f"Written by lightning-distill {__version__} with diffusers {diffusers.__version__}.", ""])


_STUDENT = (
    "A text-to-image pipeline that draws in {steps} steps, distilled from a teacher of many. Guidance is distilled in: a step "
    "is one forward. "
)
_ABOUT = {
    "student": _STUDENT + "Its code is in Python files in this directory, hence `trust_remote_code`. It needs `diffusers`, "
    "`transformers` and `accelerate`.",
    "lora_student": _STUDENT + "Here is only what was trained, LoRA and time embedders; Python files in this directory put it "
    "onto the teacher's pipeline, which stays as it is. They need `diffusers`, `transformers`, `accelerate` and `peft`.",
    "teacher": "A stock text-to-image model for {library}. Where the transformer does not embed the guidance scale, guidance "
    "costs a second branch. Prompts are padded to the length they had in training.",
}


def _listed(numbers: Sequence[int]) -> str:
    """`1, 2 or 4`."""
    *first, last = (str(number) for number in numbers)
    return f"{', '.join(first)} or {last}" if first else last


def _name(teacher: str) -> str:
    """A hub id or shipped name as it is; of a path only its end, since the rest means nothing elsewhere."""
    return Path(teacher).name if Path(teacher).exists() else teacher
