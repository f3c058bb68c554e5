"""The trained network as a diffusers directory, at the end of training."""

import math
import time
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_distill.callbacks.report import FinalReport
from lightning_distill.errors import ConfigurationError
from lightning_distill.export.directory import ModelCard, check_export_directory, export_student, export_teacher
from lightning_distill.methods.base import TeacherStudentBase


class ExportPipeline(Callback):
    """Writes the student, or the teacher that was trained, as a pipeline directory with a model card.

    It runs when `fit` has come to its end, by steps, epochs or time; after an error or an interruption there is a
    checkpoint to resume from, and no export. Nothing is written under `fast_dev_run`.

    Args:
        directory: Where to; an earlier export there is replaced. None is `student` (after training a teacher, `teacher`) in
            the run's log directory.
        notes: Further paragraphs of the model card, in Markdown.
        lora: How a student with LoRA is written: "merged" into whole weights, or "unmerged", what has trained alone, which is
            small and goes onto the teacher's pipeline.

    Raises:
        ConfigurationError: If `lora` is neither.
    """

    def __init__(self, directory: str | None = None, notes: str = "", lora: Literal["merged", "unmerged"] = "merged") -> None:
        if lora not in ("merged", "unmerged"):
            raise ConfigurationError(f"ExportPipeline.lora is {lora!r}; choose merged or unmerged")
        self.directory = directory
        self.notes = notes
        self.lora = lora
        self._target: Path | None = None
        self._seconds = 0.0
        self._since: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what could not be exported, before the training rather than after it."""
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a helper of Trainer's constructor
            return
        if not isinstance(pl_module, TeacherStudentBase):
            raise ConfigurationError(
                f"ExportPipeline writes students and teachers, and {type(pl_module).__name__} trains neither; "
                "take it out of trainer.callbacks"
            )
        if self.lora == "unmerged" and pl_module.student_options.lora is None:
            raise ConfigurationError(
                "ExportPipeline.lora is unmerged, and the student trains as a whole; set it to merged, or model.student.lora"
            )
        log_dir = trainer.log_dir or trainer.default_root_dir
        default = Path(log_dir) / ("student" if pl_module.has_teacher else "teacher")
        self._target = check_export_directory(default if self.directory is None else self.directory)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock whose reading goes into the model card."""
        self._since = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Seconds trained so far, so that a resumed run reports its whole time."""
        return {"seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where the interrupted run stopped."""
        self._seconds = state_dict["seconds"]

    def _elapsed(self) -> float:
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._seconds, self._since = self._elapsed(), None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export on the first process."""
        if self._target is None:
            return
        assert isinstance(pl_module, TeacherStudentBase), "setup has refused others"
        network = pl_module.adapter.unsharded_copy(pl_module.networks.sampling_student)
        if not trainer.is_global_zero:
            return
        card = self.model_card(trainer, pl_module)
        if pl_module.has_teacher:
            export_student(pl_module.adapter, network, self._target, card, self.lora)
        else:
            export_teacher(pl_module.adapter, network, self._target, card)
        rank_zero_info(f"Exported the {'student' if pl_module.has_teacher else 'teacher'} to {self._target}")

    def model_card(self, trainer: Trainer, module: TeacherStudentBase) -> ModelCard:
        """What a run knows about the network it trained, with the figures of `FinalReport`, or else of its last validation."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a helper of Trainer's constructor
        reports = [callback.summary for callback in callbacks if isinstance(callback, FinalReport) and callback.summary]
        figures = reports[-1].figures() if reports else {}
        if not figures:
            figures = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        return ModelCard(
            method=type(module).__name__,
            teacher=module.adapter.name,
            nfe=module.validation.nfe,
            height=module.validation.height,
            width=module.validation.width,
            guidance_scale=module.guidance.scale,
            steps=trainer.global_step,
            minutes=reports[-1].minutes if reports else self._elapsed() / 60,  # the report's are without its own pictures
            figures={name: value for name, value in figures.items() if math.isfinite(value)},
            notes=self.notes,
            torch_dtype=module.adapter.weights_dtype,
            started_from=module.student_options.pretrained,
        )
