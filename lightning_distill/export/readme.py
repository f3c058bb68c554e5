"""Model cards: the README of an exported directory."""

import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import ModelCardData

from lightning_distill import __version__
from lightning_distill.errors import alternatives
from lightning_distill.export.card import ModelCard
from lightning_distill.export.comfyui_settings import comfyui_settings
from lightning_distill.export.figures import figure_tables
from lightning_distill.teachers.families import FAMILIES
from lightning_distill.teachers.pipeline_directory import stock_network_class
from lightning_distill.teachers.teacher_lora import TeacherLora
from lightning_distill.teachers.usage import DIFFUSERS_CODE, ExportCode

IMAGES = "images.png"
"""Grid of images in an export, shown by its card."""
ADAPTERS = ("lora", "comfyui", "kohya", "lora_student")
"""Kinds of exports that are LoRA for their base model."""


def write_card(
    directory: Path, card: ModelCard, kind: str, arguments: Mapping[str, object], code: ExportCode = DIFFUSERS_CODE
) -> None:
    """Write the README of an export, and copy its grid of images and the license files of the teacher.

    Args:
        directory: Directory of the export.
        card: Contents.
        kind: Kind of the export, as in `render_card`.
        arguments: Further arguments of the pipeline, besides prompt, steps and size.
        code: Code snippets that load the export and sample from it.
    """
    _write(directory, card, render_card(card, kind, arguments, code))


def write_overview(directory: Path, card: ModelCard, library: str) -> None:
    """Write the README of a directory with several exports of a student, each in a folder with a card of its own.

    Args:
        directory: Directory with the folders, such as `stock_4`.
        card: Contents.
        library: Library that loads the exports.
    """
    folders = sorted(path.name for path in directory.iterdir() if path.is_dir())
    kinds = {name: name.rstrip("0123456789").rstrip("_") for name in folders}
    kind = "lora" if set(kinds.values()) <= set(ADAPTERS) else "several"
    lines = ["---", _metadata(card, kind, library), "---", "", "# Few-step student", ""]
    lines += [_OVERVIEW.format(steps=_steps(card), folder=folders[0]), "", *_grid(card), "| folder | contents |", "|---|---|"]
    for name in folders:
        nfe = name.removeprefix(kinds[name]).lstrip("_")
        lines.append(f"| `{name}` | {_CONTENTS[kinds[name]]}{f' for {nfe} step' + 's' * (nfe != '1') if nfe else ''} |")
    _write(directory, card, "\n".join([*lines, "", *_facts(card, kind)]))


def _write(directory: Path, card: ModelCard, text: str) -> None:
    (directory / "README.md").write_text(text, encoding="utf-8")
    if card.images is not None:
        shutil.copyfile(card.images, directory / IMAGES)
    for file in card.license.files:
        shutil.copyfile(file, directory / file.name)


def render_card(card: ModelCard, kind: str, arguments: Mapping[str, object], code: ExportCode = DIFFUSERS_CODE) -> str:
    """The README of an export in Markdown, with the metadata for the hub.

    Args:
        card: Contents.
        kind: "any_step", "lora_student", "stock", "lora", "comfyui", "kohya", "single_file" or "teacher".
        arguments: Further arguments of the pipeline, besides prompt, steps and size.
        code: Code snippets that load the export and sample from it.
    """
    lines = ["---", _metadata(card, kind, code.library), "---", "", f"# {_TITLES.get(kind, 'Few-step student')}", ""]
    only = _ONE_NUMBER if card.residual is not None else ""
    lines += [_ABOUT[kind].format(steps=_steps(card), library=code.library, only=only), "", *_grid(card)]
    lines += ["```python", _code(card, kind, arguments, code).rstrip(), "```", ""]
    return "\n".join([*lines, *_comfyui(card, kind, arguments), *_facts(card, kind)])


def _steps(card: ModelCard) -> str:
    return "1 step" if tuple(card.nfe) == (1,) else f"{alternatives(card.nfe)} steps"


def _grid(card: ModelCard) -> list[str]:
    return [] if card.images is None else [f"![Images of validation prompts by number of steps]({IMAGES})", ""]


def _facts(card: ModelCard, kind: str) -> list[str]:
    """Settings, figures, scheduler, notes and license."""
    student = kind != "teacher"
    facts: dict[str, object] = {
        "Method": card.method,
        "Teacher" if student else "Started from": base_name(card.teacher),
        "LoRA merged into it": ", ".join(map(str, card.teacher_lora)) or None,
        **({} if card.started_from is None else {"Started from": base_name(card.started_from)}),
        "Image size": f"{card.height} x {card.width} pixels",
        "Guidance scale": f"{card.guidance_scale:g}",
        "Training steps": card.steps,
        "Training time": None if card.minutes is None else f"{card.minutes:.1f} minutes",
        **card.settings,
        "Error of the time embeddings": None if card.residual is None else f"{card.residual:.1e}",
        "Condition number of their hidden vectors": None if card.condition_number is None else f"{card.condition_number:.3g}",
        "Error of the extracted LoRA": None if card.lora_error is None else f"{card.lora_error:.3g} of the change",
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items() if value is not None)]
    if card.figures:
        lines += ["", "## Measured", "", *figure_tables(card.figures)]
    if card.scheduler is not None:
        config = json.dumps(card.scheduler["config"], indent=2, default=str)
        lines += ["", "## Scheduler", "", f"`{card.scheduler['class']}` with this configuration:", "", "```json", config, "```"]
    lines += ["", card.notes] if card.notes else []
    lines += ["", card.license.sentence()] if student else []
    return [*lines, "", f"Written by lightning-distill {__version__} with diffusers {diffusers.__version__}.", ""]


def _metadata(card: ModelCard, kind: str, library: str) -> str:
    on_hub = _is_hub_id(card.teacher)
    relation = "adapter" if kind in ADAPTERS else "finetune"
    data = ModelCardData(
        library_name=library,
        pipeline_tag="text-to-image",
        base_model=card.teacher if on_hub else None,
        license=card.license.license,
        license_name=card.license.name,
        license_link=card.license.link,
        tags=["lightning-distill", *(["lora"] if kind in ADAPTERS else []), *(["comfyui"] if kind == "comfyui" else [])],
    )
    if on_hub:
        data["base_model_relation"] = relation
    return str(data.to_yaml()).rstrip()


def _comfyui(card: ModelCard, kind: str, arguments: Mapping[str, object]) -> list[str]:
    if kind not in ("lora", "comfyui", "kohya", "single_file") or card.scheduler is None:
        return []
    settings = comfyui_settings(card.pipeline_class, card.nfe, card.scheduler, arguments, kind == "single_file")
    if not settings:
        return []
    if card.teacher_lora and kind != "single_file":
        settings["LoRA of the teacher"] = f"{', '.join(map(str, card.teacher_lora))}, node `LoraLoaderModelOnly` for each"
    rows = [f"| {name} | {value} |" for name, value in settings.items()]
    return ["## Settings in ComfyUI", "", "| | |", "|---|---|", *rows, ""]


def base_name(teacher: str) -> str:
    """A hub id or shipped name unchanged; only the last part of a local path, which means nothing on other machines."""
    return teacher if _is_hub_id(teacher) else Path(teacher).name


def _is_hub_id(teacher: str) -> bool:
    """Whether a teacher is on the hub; an export may be made where a local path does not exist."""
    return teacher.count("/") == 1 and not teacher.startswith((".", "/", "~")) and not Path(teacher).exists()


def _code(card: ModelCard, kind: str, arguments: Mapping[str, object], code: ExportCode) -> str:
    """Code that loads an export and samples an image from it."""
    snippets = {
        "any_step": code.student,
        "lora_student": code.lora_student,
        "stock": code.stock,
        "lora": code.lora,
        "comfyui": code.lora,
        "kohya": code.lora,
        "single_file": code.single_file,
        "teacher": code.teacher,
    }
    steps = 32 if kind == "teacher" else max(card.nfe)
    inputs = [
        '"a prompt"' if kind == "any_step" else 'prompt="a prompt"',
        *(f"{name}={json.dumps(value) if isinstance(value, str) else value}" for name, value in arguments.items()),
        f"num_inference_steps={steps}",
        f"height={card.height}",
        f"width={card.width}",
    ]
    network = FAMILIES[card.pipeline_class].network_class if card.pipeline_class else None
    return snippets[kind].format(
        base=base_name(card.teacher),
        torch_dtype=card.torch_dtype,
        base_lora="".join(
            _merge_code(code, each, "base" if kind == "lora_student" else "pipeline") for each in card.teacher_lora
        ),
        inputs="\n".join(f"    {each}," for each in inputs),
        steps=steps,
        guidance_scale=card.guidance_scale,
        height=card.height,
        width=card.width,
        file=card.file,
        network_class="" if network is None else stock_network_class(network).__name__,
        scheduler_class="" if card.scheduler is None else card.scheduler["class"],
        scheduler="" if card.scheduler is None else _scheduler_code(card.scheduler),
    )


def _merge_code(code: ExportCode, lora: TeacherLora, pipeline: str) -> str:
    options = "" if lora.weight_name is None else f', weight_name="{lora.weight_name}"'
    return code.merge_lora.format(pipeline=pipeline, name=lora.name, options=options, weight=lora.weight)


def _scheduler_code(scheduler: Mapping[str, Any]) -> str:
    """Code that creates a scheduler: the settings that differ from the defaults of its class."""
    kind = getattr(diffusers, scheduler["class"])
    defaults = {name: each.default for name, each in inspect.signature(kind.__init__).parameters.items()}
    config = {name: value for name, value in scheduler["config"].items() if name in defaults and value != defaults[name]}
    return f"{kind.__name__}({', '.join(f'{name}={value!r}' for name, value in config.items())})"


_STUDENT = (
    "A text-to-image {kind} that generates images in {{steps}}, distilled from a many-step teacher. Guidance is distilled in: "
    "a step is one forward pass, without a negative prompt. "
)
_ONE_NUMBER = "It is for this number of steps alone. "
_PIPELINE = _STUDENT.format(kind="pipeline")
_LORA = _STUDENT.format(kind="LoRA") + "{only}It has the scale in its weights: load it with strength 1. "
_TITLES = {
    "teacher": "Flow-matching teacher",
    "lora": "Few-step LoRA",
    "comfyui": "Few-step LoRA for ComfyUI",
    "kohya": "Few-step LoRA in the format of kohya's scripts",
    "single_file": "Few-step transformer in one file",
}
_OVERVIEW = (
    "Exports of one student that generates images in {steps}, distilled from a many-step teacher. Each folder has a card with "
    "the code that loads it. From the hub, `huggingface_hub.snapshot_download` fetches one folder by "
    '`allow_patterns="{folder}/*"`.'
)
_CONTENTS = {
    "any_step": "pipeline for any number of steps, with code of its own",
    "stock": "stock pipeline of diffusers",
    "lora": "LoRA",
    "comfyui": "LoRA for ComfyUI",
    "kohya": "LoRA in the format of kohya's scripts",
    "single_file": "transformer in one file",
}
_ABOUT = {
    "any_step": _PIPELINE + "Its code is in Python files in this directory, so loading needs `trust_remote_code`. It needs "
    "`diffusers`, `transformers` and `accelerate`.",
    "lora_student": _PIPELINE + "This directory has only the trained weights: LoRA and time embedders. Python files in this "
    "directory load them onto the teacher's pipeline, whose own weights do not change. They need `diffusers`, `transformers`, "
    "`accelerate` and `peft`.",
    "stock": _PIPELINE + "{only}It is a pipeline of `{library}` without code of its own.",
    "lora": _LORA + "`load_lora_weights` of `{library}` reads it, beside other LoRA if wanted.",
    "comfyui": _LORA + "The names of its weights are those of ComfyUI; `{library}` converts them.",
    "kohya": _LORA + "The names of its weights are those of kohya's scripts and of Forge; `{library}` converts them.",
    "single_file": _STUDENT.format(kind="transformer") + "{only}The layout is that of the original checkpoint, for "
    "ComfyUI's folder `diffusion_models`; `{library}` reads it by `from_single_file`.",
    "teacher": "A stock text-to-image model for {library}. If the transformer does not embed the guidance scale, guidance "
    "needs a second branch. Prompts are padded to the length that they had in training.",
}
