"""Contents of model cards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_distill.export.teacher_license import TeacherLicense, teacher_license
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.students.lora_student import LORA_WEIGHTS
from lightning_distill.teachers.teacher_lora import TeacherLora


@dataclass(frozen=True)
class ModelCard:
    """Contents of the README of an exported directory.

    Args:
        method: Name of the method that trained the network.
        teacher: Name, directory or hub id of the teacher, or of the initial weights if there was no teacher.
        nfe: Numbers of sampling steps at which the network was validated, or for which the export is.
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
        settings: Further settings of the training, by their names in the card.
        license: License of the teacher.
        images: PNG file with a grid of images, which is copied into the export.
        pipeline_class: Class of the stock pipeline of diffusers; empty for teachers outside diffusers.
        scheduler: "class" and "config" of the scheduler that an export for one number of steps is used with.
        file: Name of the file of LoRA weights or of a transformer.
        residual: Largest error of the time embeddings of a stock export or LoRA, as a fraction of their largest entry; None
            if time is the teacher's, so that the export is for any number of steps.
        condition_number: Condition number of the hidden vectors from which the time update is solved.
        lora_error: Relative error of a LoRA that was extracted from a full student.
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
    settings: Mapping[str, object] = field(default_factory=dict)
    license: TeacherLicense = field(default_factory=TeacherLicense)
    images: Path | None = None
    pipeline_class: str = ""
    scheduler: Mapping[str, Any] | None = None
    file: str = LORA_WEIGHTS
    residual: float | None = None
    condition_number: float | None = None
    lora_error: float | None = None

    @classmethod
    def from_method(
        cls,
        method: TeacherStudentBase,
        *,
        steps: int,
        minutes: float | None = None,
        figures: Mapping[str, float] | None = None,
        notes: str = "",
        images: Path | None = None,
    ) -> "ModelCard":
        """Card of the network that a method trained.

        Args:
            method: The method, which provides the settings.
            steps: Optimizer steps of the training.
            minutes: Training time.
            figures: Measured figures by name.
            notes: Further paragraphs, in Markdown.
            images: PNG file with a grid of images.
        """
        options, adapter = method.student_options, method.adapter
        lora = options.lora
        settings: dict[str, object] = {
            "LoRA": None if lora is None else f"rank {lora.rank}, alpha {lora.rank if lora.alpha is None else lora.alpha:g}",
            "Time embedding": options.time_embedding if method.has_teacher else None,
            "EMA decay": method.ema_decay,
        }
        return cls(
            method=type(method).__name__,
            teacher=adapter.name,
            nfe=method.validation.nfe,
            height=method.validation.height,
            width=method.validation.width,
            guidance_scale=method.guidance.scale,
            steps=steps,
            minutes=minutes,
            figures=figures or {},
            notes=notes,
            torch_dtype=adapter.weights_dtype,
            started_from=options.pretrained,
            teacher_lora=adapter.lora,
            settings={name: value for name, value in settings.items() if value is not None},
            license=teacher_license(adapter.name, adapter.revision),
            images=images,
            pipeline_class=adapter.pipeline_class,
        )
