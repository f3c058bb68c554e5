"""Export of the trained network at the end of training."""

import math
import time
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_distill.callbacks.report import FinalReport
from lightning_distill.errors import ConfigurationError
from lightning_distill.export.card import ModelCard
from lightning_distill.export.directory import check_export_directory, export_student, export_teacher
from lightning_distill.methods.base import TeacherStudentBase


class ExportPipeline(Callback):
    """Exports the student, or the trained teacher, as a pipeline directory with a model card.

    It exports when `fit` reaches its limit of steps, epochs or time. After an error or an interruption it exports nothing; the
    checkpoint resumes the run. Under `fast_dev_run` it writes nothing.

    Args:
        directory: Target directory; an earlier export in it is replaced. None is `student` in the trainer's
            `default_root_dir`, or `teacher` after training a teacher.
        notes: Further paragraphs of the model card, in Markdown.
        lora: Format of a LoRA student: "merged" for full weights, or "unmerged" for only the trained weights. Those are small
            and load onto the teacher's pipeline.

    Raises:
        ConfigurationError: If `lora` is neither "merged" nor "unmerged".
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
        """Check before training that the export is possible.

        Raises:
            ConfigurationError: If the module is not a `TeacherStudentBase`, or the directory cannot be written, or has files
                that are not an earlier export. Also if `lora` is "unmerged" and the student has no LoRA.
        """
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a helper of Trainer's constructor
            return
        if not isinstance(pl_module, TeacherStudentBase):
            raise ConfigurationError(
                f"ExportPipeline exports students and teachers, but {type(pl_module).__name__} trains neither; "
                "remove it from trainer.callbacks"
            )
        if self.lora == "unmerged" and pl_module.student_options.lora is None:
            raise ConfigurationError(
                "ExportPipeline.lora is unmerged, but model.student.lora is null; set ExportPipeline.lora to merged, or "
                "model.student.lora to LoRA options"
            )
        default = Path(trainer.default_root_dir) / ("student" if pl_module.has_teacher else "teacher")
        self._target = check_export_directory(self.directory or default, "ExportPipeline.directory")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the training time in the model card."""
        self._since = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Training time so far in seconds; a resumed run reports the time of all its parts."""
        return {"seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the training time of the interrupted run."""
        self._seconds = state_dict["seconds"]

    def _elapsed(self) -> float:
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._seconds, self._since = self._elapsed(), None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export on process 0."""
        if self._target is None:
            return
        assert isinstance(pl_module, TeacherStudentBase), "setup checks this"
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
        """Model card of the run, with the figures of `FinalReport` or, without a report, of the last validation."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a helper of Trainer's constructor
        reports = [callback for callback in callbacks if isinstance(callback, FinalReport) and callback.summary]
        report = reports[-1] if reports else None
        summary = None if report is None else report.summary
        figures = {} if summary is None else summary.figures()
        if not figures:
            figures = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        return ModelCard.from_method(
            module,
            steps=trainer.global_step,
            minutes=self._elapsed() / 60 if summary is None else summary.minutes,  # excludes the time that the report takes
            figures={name: value for name, value in figures.items() if math.isfinite(value)},
            notes=self.notes,
            images=None if report is None else report.images,
        )
