"""Export of the trained network at the end of training."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_distill.callbacks.report import FinalReport
from lightning_distill.errors import ConfigurationError
from lightning_distill.export.card import ModelCard
from lightning_distill.export.directory import check_export_directory
from lightning_distill.export.formats import FormatOptions, PlannedExport, check_format_options, plan_exports
from lightning_distill.export.students import export_student, export_teacher
from lightning_distill.methods.base import TeacherStudentBase


class ExportPipeline(Callback):
    """Exports the student, or the trained teacher, as a pipeline directory with a model card.

    It exports when `fit` reaches its limit of steps, epochs or time. After an error or an interruption it exports nothing; the
    checkpoint resumes the run. Under `fast_dev_run` it writes nothing.

    Args:
        directory: Target directory; an earlier export in it is replaced. None is `student` in the trainer's
            `default_root_dir`, or `teacher` after training a teacher.
        notes: Further paragraphs of the model card, in Markdown.
        lora: Form of a LoRA student in the format "any_step": "merged" for full weights, "unmerged" for only the trained
            weights.
        formats: "any_step" for any number of steps, with code; "stock", a pipeline of diffusers without code;
            "lora", "comfyui" and "kohya", LoRA files for these tools; "single_file", the transformer in its original layout.
            One export is written to `directory`, several to its subfolders. None: "stock" for the largest number of steps and
            "any_step"; for LoRA students "lora" for each number of steps.
        nfe: Numbers of steps, each with exports of its own, except for "any_step". None: those of validation.
        rank: Rank of a LoRA that is extracted from a student without LoRA.

    Raises:
        ConfigurationError: If an option of the formats is invalid.
    """

    def __init__(
        self,
        directory: str | None = None,
        notes: str = "",
        lora: Literal["merged", "unmerged"] = "merged",
        formats: Sequence[str] | None = None,
        nfe: Sequence[int] | None = None,
        rank: int | None = None,
    ) -> None:
        self.options = FormatOptions(
            None if formats is None else tuple(formats), None if nfe is None else tuple(nfe), rank, lora
        )
        check_format_options(self.options, "ExportPipeline.")
        self.directory = directory
        self.notes = notes
        self._planned: list[PlannedExport] = []
        self._target: Path | None = None
        self._seconds = 0.0
        self._since: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before training that the export is possible.

        Raises:
            ConfigurationError: If the module is not a `TeacherStudentBase`, or the directory cannot be written, or has files
                that are not an earlier export. Also if a format cannot represent the student.
        """
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a helper of Trainer's constructor
            return
        if not isinstance(pl_module, TeacherStudentBase):
            raise ConfigurationError(
                f"ExportPipeline exports students and teachers, but {type(pl_module).__name__} trains neither; "
                "remove it from trainer.callbacks"
            )
        if pl_module.has_teacher:
            student, validated = pl_module.student_options, pl_module.validation.nfe
            self._planned = plan_exports(self.options, pl_module.adapter, student, validated, "ExportPipeline.")
        elif self.options != FormatOptions():
            raise ConfigurationError(
                f"ExportPipeline has options of formats, but {type(pl_module).__name__} trains a teacher, which is exported "
                "as a stock pipeline; leave formats, nfe, rank and lora out"
            )
        default = Path(trainer.default_root_dir) / ("student" if pl_module.has_teacher else "teacher")
        self._target = check_export_directory(self.directory or default, "ExportPipeline.directory")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that stock networks can separate the steps of the planned exports.

        Raises:
            ConfigurationError: If two steps have the same time in 16 bits.
        """
        for nfe in sorted({each.nfe for each in self._planned if each.nfe is not None}):
            assert isinstance(pl_module, TeacherStudentBase), "setup checks this"
            options = pl_module.validation
            try:
                pl_module.adapter.check_stock_grid(pl_module.networks.student, nfe, options.height, options.width)
            except ConfigurationError as error:
                raise ConfigurationError(f"ExportPipeline.{error}") from error

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
            export_student(pl_module.adapter, network, self._target, card, self._planned, self.options)
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
