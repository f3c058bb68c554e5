"""Model cards: the README of an exported directory."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import diffusers

from lightning_distill import __version__
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.teachers.teacher_lora import TeacherLora
from lightning_distill.teachers.usage import DIFFUSERS_CODE, MERGE_LORA, ExportCode


@dataclass(frozen=True)
class ModelCard:
    """Contents of the README of an exported directory.

    Args:
        method: Name of the method that trained the network.
        teacher: Name, directory or hub id of the teacher, or of the initial weights if there was no teacher.
        nfe: Numbers of sampling steps at which the network was validated.
        height: Height of its images in pixels.
        width: Width of its images in pixels.
        guidance_scale: Guidance scale that was distilled in, or under which a teacher was validated.
        steps: Optimizer steps of the training.
        minutes: Training time.
        figures: Measured figures by name, such as "val/prompt_accuracy/nfe_4".
        notes: Further paragraphs, in Markdown.
        torch_dtype: Dtype of the teacher's weights, in which the base model of a LoRA student is loaded.
        started_from: Name, directory or hub id of the student with the initial weights. None: they are the teacher's.
        teacher_lora: LoRA that is merged into the teacher.
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
    teacher_lora: Sequence[TeacherLora] = ()

    @classmethod
    def from_method(
        cls,
        method: TeacherStudentBase,
        *,
        steps: int,
        minutes: float | None = None,
        figures: Mapping[str, float] | None = None,
        notes: str = "",
    ) -> "ModelCard":
        """Card of the network that a method trained.

        Args:
            method: The method, which provides the settings.
            steps: Optimizer steps of the training.
            minutes: Training time.
            figures: Measured figures by name.
            notes: Further paragraphs, in Markdown.
        """
        return cls(
            method=type(method).__name__,
            teacher=method.adapter.name,
            nfe=method.validation.nfe,
            height=method.validation.height,
            width=method.validation.width,
            guidance_scale=method.guidance.scale,
            steps=steps,
            minutes=minutes,
            figures=figures or {},
            notes=notes,
            torch_dtype=method.adapter.weights_dtype,
            started_from=method.student_options.pretrained,
            teacher_lora=method.adapter.lora,
        )


def render_card(card: ModelCard, kind: str, arguments: Mapping[str, object], code: ExportCode = DIFFUSERS_CODE) -> str:
    """The README of an export in Markdown, with the metadata for the hub.

    Args:
        card: Contents.
        kind: "student", "lora_student" or "teacher".
        arguments: Further arguments of the pipeline, besides prompt, steps and size.
        code: Code snippets that load the export and sample from it.
    """
    student = kind != "teacher"
    base = [] if Path(card.teacher).exists() or "/" not in card.teacher else [f"base_model: {card.teacher}"]
    facts = {
        "Method": card.method,
        "Teacher" if student else "Started from": _name(card.teacher),
        "LoRA merged into it": ", ".join(map(str, card.teacher_lora)) or None,
        **({} if card.started_from is None else {"Started from": _name(card.started_from)}),
        "Image size": f"{card.height} x {card.width} pixels",
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
    lines += [f"# {title}", "", _ABOUT[kind].format(steps=_enumeration(card.nfe), library=code.library), ""]
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
        base_lora="".join(map(_merge_code, card.teacher_lora)),
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
    lines += ["", "The weights derive from the teacher's weights, whose license applies to them."] if student else []
    return "\n".join([*lines, "", f"Written by lightning-distill {__version__} with diffusers {diffusers.__version__}.", ""])


_STUDENT = (
    "A text-to-image pipeline that generates images in {steps} steps, distilled from a many-step teacher. Guidance is "
    "distilled in: a step is one forward pass. "
)
_ABOUT = {
    "student": _STUDENT + "Its code is in Python files in this directory, so loading needs `trust_remote_code`. It needs "
    "`diffusers`, `transformers` and `accelerate`.",
    "lora_student": _STUDENT + "This directory has only the trained weights: LoRA and time embedders. Python files in this "
    "directory load them onto the teacher's pipeline, whose own weights do not change. They need `diffusers`, `transformers`, "
    "`accelerate` and `peft`.",
    "teacher": "A stock text-to-image model for {library}. If the transformer does not embed the guidance scale, guidance "
    "needs a second branch. Prompts are padded to the length that they had in training.",
}


def _merge_code(lora: TeacherLora) -> str:
    options = "" if lora.weight_name is None else f', weight_name="{lora.weight_name}"'
    return MERGE_LORA.format(name=lora.name, options=options, weight=lora.weight)


def _enumeration(numbers: Sequence[int]) -> str:
    """`1, 2 or 4`."""
    *first, last = (str(number) for number in numbers)
    return f"{', '.join(first)} or {last}" if first else last


def _name(teacher: str) -> str:
    """A hub id or shipped name unchanged; only the last part of a local path, which means nothing on other machines."""
    return Path(teacher).name if Path(teacher).exists() else teacher
