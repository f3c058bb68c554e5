"""Final report of a run: a table, an image grid, and the figures as JSON."""

import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from rich import box
from rich.table import Table
from torchmetrics import Metric

from lightning_distill.callbacks.images import (
    evaluation_mode,
    gather_prompts,
    image_grid,
    sampling_method,
    student_rows,
    teacher_row,
    unique_prompts,
)
from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.methods.evaluation import Network, computed_values, metric_name
from lightning_distill.metrics.diversity import PromptDiversity
from lightning_distill.outputs import atomic_file, check_directory
from lightning_distill.paths import expand_path

SUMMARY = "summary.json"
"""File of the figures of a run."""
IMAGES = "images.png"
"""File of the image grid of a run."""
PromptBatch = tuple[list[int], list[str]]
"""Indices in the data set, and the captions of these indices."""


@dataclass
class Summary:
    """Figures of a finished run, the contents of `summary.json`. Numbers of steps are keys, as strings.

    Attributes:
        teacher: Overall metric of the teacher by number of steps.
        student: Overall metric of the student by number of steps.
        minutes: Time of training with its validations, over all resumed parts.
        steps: Optimizer steps of the training.
        categories: The metric by network, number of steps and category.
        diversity: `PromptDiversity` by network and number of steps.
    """

    teacher: dict[str, float] = field(default_factory=dict)
    student: dict[str, float] = field(default_factory=dict)
    minutes: float = 0.0
    steps: int = 0
    categories: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    diversity: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def accuracy(self) -> dict[str, dict[str, float]]:
        """Overall metric by network and number of steps."""
        return {"student": self.student, "teacher": self.teacher}

    def figures(self) -> dict[str, float]:
        """Figures of both networks by name, such as "student/accuracy/nfe_4" and "student/diversity/nfe_4"."""
        measures = {"accuracy": self.accuracy, "diversity": self.diversity}
        return {
            f"{network}/{measure}/nfe_{nfe}": value
            for measure, networks in measures.items()
            for network, values in networks.items()
            for nfe, value in values.items()
        }


class FinalReport(Callback):
    """Measures student and teacher on the validation prompts at the end of training.

    It prints a table and writes `summary.json` (see `Summary`) and `images.png`. The student is measured at the validated
    numbers of steps, the teacher at these numbers and at `teacher_nfe`, from the same noise. This noise differs from that of
    the validations, because settings may be tuned on them. The processes share the work. A run that ends by an exception, or
    a `fast_dev_run`, has no report.

    Args:
        directory: Directory of the files; None is the trainer's `default_root_dir`.
        noises: Number of measured images per validation prompt, each from different noise, at least 1.
        seed: First noise seed, far from those of validation, which count from `validation.seed`.
        columns: Number of different prompts in the image grid, at least 1.
        diversity_prompts: Number of different prompts for the diversity; 0 measures no diversity.
        diversity_seeds: Number of images of each of these prompts, at least 2.
        teacher: Whether the teacher is measured as well. This takes longest, and the figures are the same after every run with
            the same validation. `images.png` shows the teacher in any case.

    Attributes:
        summary: The figures at the end of training; None before, and if nothing was measured.
        images: File of the image grid at the end of training; None before, and if there is none.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    def __init__(
        self,
        directory: str | None = None,
        noises: int = 1,
        seed: int = 1_000_000,
        columns: int = 12,
        diversity_prompts: int = 12,
        diversity_seeds: int = 8,
        teacher: bool = True,
    ) -> None:
        if noises < 1:
            raise ConfigurationError(f"FinalReport.noises is {noises}; set it to at least 1 image per prompt")
        if columns < 1:
            raise ConfigurationError(f"FinalReport.columns is {columns}; set it to at least 1 prompt")
        if diversity_prompts < 0:
            raise ConfigurationError(
                f"FinalReport.diversity_prompts is {diversity_prompts}; set it to at least 1, or to 0 for no diversity"
            )
        if diversity_seeds < 2:
            raise ConfigurationError(
                f"FinalReport.diversity_seeds is {diversity_seeds}; set it to at least 2, because diversity compares images"
            )
        self.directory = directory and expand_path(directory, "FinalReport.directory")
        self.noises = noises
        self.seed = seed
        self.columns = columns
        self.diversity_prompts = diversity_prompts
        self.diversity_seeds = diversity_seeds
        self.teacher = teacher
        self.summary: Summary | None = None
        self.images: Path | None = None
        self._seconds = 0.0
        self._started: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the method samples images, and that the report can be written.

        Raises:
            ConfigurationError: If not.
        """
        sampling_method(self, pl_module)
        is_dry_run = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a helper of Trainer's constructor
        if stage == "fit" and not is_dry_run:
            check_directory(self.directory or trainer.default_root_dir, "FinalReport.directory")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the training time."""
        self._started = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, measure and report; `on_fit_end` is too late, where the module is off its device."""
        self._seconds, self._started = self._elapsed(), None
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a helper of Trainer's constructor
            return
        module = sampling_method(self, pl_module)
        directory = Path(self.directory or trainer.default_root_dir)
        batches = list(validation_prompts(trainer))
        prompts = gather_prompts(pair for batch in batches for pair in zip(*batch, strict=True))
        if not prompts:
            self._print(trainer, "Final report: no validation prompts, so nothing was measured.")
            return
        with evaluation_mode(trainer, module):
            self.summary = summary = self._measure(module, batches, prompts)
            summary.steps = trainer.global_step
            columns = unique_prompts(prompts, self.columns)
            seeds = range(self.seed, self.seed + len(columns))
            rows = student_rows(module, columns, seeds) | teacher_row(module, columns, seeds)
        if trainer.is_global_zero:
            self.images = directory / IMAGES
            with atomic_file(directory / SUMMARY) as file:
                file.write((json.dumps(asdict(summary), indent=2) + "\n").encode())
            with atomic_file(self.images) as file:
                image_grid(rows, columns).save(file, format="png")
        if module.metrics:
            metric = next(iter(module.metrics.values()))
            assert isinstance(metric, Metric)
            title = f"{metric_name(metric).replace('_', ' ').capitalize()} on the validation prompts"
            percent = is_rate(metric)
            self._print(trainer, report_table(summary, f"{title}, %" if percent else title, percent))
        else:
            self._print(trainer, "Final report: model.metric is not set, so there are images but no accuracy.")
        self._print(trainer, f"Trained for {summary.minutes:.1f} minutes. See {directory}/images.png and summary.json.")

    def state_dict(self) -> dict[str, Any]:
        """Training time so far in seconds."""
        return {"seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the training time of the interrupted run."""
        self._seconds = state_dict["seconds"]

    def _elapsed(self) -> float:
        return self._seconds + (time.perf_counter() - self._started if self._started is not None else 0.0)

    def _measure(self, module: TeacherStudentBase, batches: Sequence[PromptBatch], prompts: Sequence[str]) -> Summary:
        summary = Summary(minutes=round(self._seconds / 60, 6))
        nfe, teacher_nfe = module.validation.nfe, module.validation.teacher_nfe
        with_teacher = module.has_teacher and self.teacher
        steps: dict[Network, list[int]] = {"student": list(nfe)}
        if with_teacher:
            steps["teacher"] = sorted({*nfe, teacher_nfe})
        if module.metrics:
            for network, counts in steps.items():
                measured = {str(n): self._accuracy(module, batches, n, network) for n in counts}
                summary.accuracy[network].update({n: values.pop("overall") for n, values in measured.items()})
                summary.categories[network] = measured
        if self.diversity_prompts:
            prompts = unique_prompts(prompts, self.diversity_prompts)
            summary.diversity["student"] = {str(n): self._diversity(module, prompts, n, "student") for n in nfe}
            if with_teacher:
                summary.diversity["teacher"] = {str(teacher_nfe): self._diversity(module, prompts, teacher_nfe, "teacher")}
        return summary

    def _accuracy(
        self, module: TeacherStudentBase, batches: Sequence[PromptBatch], nfe: int, network: Network
    ) -> dict[str, float]:
        """The module's metric of a network's images at a number of steps, over the batches of all processes."""
        metric = copy.deepcopy(next(iter(module.metrics.values())))
        assert isinstance(metric, Metric)
        metric.reset()
        for indices, prompts in batches:
            repeated = [prompt for prompt in prompts for _ in range(self.noises)]
            seeds = [self.seed + index * self.noises + i for index in indices for i in range(self.noises)]
            metric.update(module.sample(repeated, nfe, seeds, network), repeated)
        return {name: float(value) for name, value in computed_values(metric).items()}

    def _diversity(self, module: TeacherStudentBase, prompts: Sequence[str], nfe: int, network: Network) -> float:
        # Every process samples all images, because sharded networks need all processes; its figure is not reduced.
        metric = PromptDiversity(sync_on_compute=False).to(module.device)
        for i, prompt in enumerate(prompts):
            seeds = range(self.seed + i * self.diversity_seeds, self.seed + (i + 1) * self.diversity_seeds)
            metric.update(module.sample([prompt] * len(seeds), nfe, seeds, network), [prompt] * len(seeds))
        return float(metric.compute())

    def _print(self, trainer: Trainer, content: Table | str) -> None:
        if trainer.is_global_zero:
            rich.get_console().print(content)


def read_report(directory: Path, steps: int) -> tuple[Summary, Path | None] | None:
    """Figures and image grid of a finished run.

    Args:
        directory: Directory of the run.
        steps: Optimizer steps of a checkpoint.

    Returns:
        The figures and the file of the grid; None if the run has no report, or one after another number of steps.
    """
    file, images = directory / SUMMARY, directory / IMAGES
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        summary = Summary(**content)
    except (ValueError, TypeError) as error:
        rank_zero_warn(f"{file} is not the summary of a run ({error}); the model card has no figures")
        return None
    return (summary, images if images.is_file() else None) if summary.steps == steps else None


def validation_prompts(trainer: Trainer) -> Iterator[PromptBatch]:
    """This process's share of the prompts of validation."""
    if trainer.val_dataloaders is None:
        return
    loaders = CombinedLoader(trainer.val_dataloaders, "sequential").flattened
    for loader, limit in zip(loaders, trainer.num_val_batches, strict=True):
        for batch in islice(loader, None if math.isinf(limit) else int(limit)):
            yield batch["index"].tolist(), list(batch["prompt"])


def is_rate(metric: Metric) -> bool:
    """Whether a metric lies in [0, 1] by the bounds that torchmetrics gives its metrics."""
    return (metric.plot_lower_bound, metric.plot_upper_bound) == (0, 1)


def report_table(summary: Summary, title: str, percent: bool) -> Table:
    """Table with a row for each network and number of steps, and a column for each category.

    Args:
        summary: The figures.
        title: Title of the table.
        percent: Whether the metric is a rate, whose values are printed in percent.
    """

    def cell(value: float) -> str:
        return f"{100 * value:.1f}" if percent else f"{value:.4g}"

    names = list(dict.fromkeys(name for rows in summary.categories.values() for row in rows.values() for name in row))
    table = Table(title=title, box=box.SIMPLE, padding=0)  # to fit 80 columns
    table.add_column("")
    for name in ["steps", *names, "overall", *(["diversity"] if summary.diversity else [])]:
        table.add_column(name.replace("_", "\n"), justify="right")
    for network, rows in summary.categories.items():
        for nfe, categories in rows.items():
            cells = [cell(categories[name]) if name in categories else "" for name in names]
            cells.append(cell(summary.accuracy[network][nfe]))
            if summary.diversity:
                diversity = summary.diversity.get(network, {}).get(nfe)
                cells.append("" if diversity is None else f"{diversity:.3f}")
            table.add_row(network, nfe, *cells)
        table.add_section()
    return table
