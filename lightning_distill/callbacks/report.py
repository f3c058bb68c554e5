"""What a run has come to: a table, a grid of pictures, and the figures for machines."""

import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from rich import box
from rich.table import Table
from torchmetrics import Metric

from lightning_distill.callbacks.images import (
    different_prompts,
    evaluating,
    image_grid,
    prompts_in_order,
    sampling_method,
    student_rows,
    teacher_row,
)
from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.methods.evaluation import computed_values, metric_name
from lightning_distill.metrics.diversity import PromptDiversity

Network = Literal["student", "teacher"]
PromptBatch = tuple[list[int], list[str]]
"""Places in the data set, and the captions there."""


@dataclass
class Summary:
    """The figures of a finished run, as `summary.json` has them; numbers of steps are keys, as strings.

    Attributes:
        teacher: Overall measure by number of steps, in [0, 1].
        student: Likewise.
        minutes: Training with its validations, over all resumes.
        categories: The measure by network, number of steps and category.
        diversity: `PromptDiversity` by network and number of steps.
    """

    teacher: dict[str, float] = field(default_factory=dict)
    student: dict[str, float] = field(default_factory=dict)
    minutes: float = 0.0
    categories: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    diversity: dict[str, dict[str, float]] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """The figures of both networks by name, such as "student/accuracy/nfe_4" and "student/diversity/nfe_4"."""
        accuracy = {"student": self.student, "teacher": self.teacher}
        measures = {"accuracy": accuracy, "diversity": self.diversity}
        return {
            f"{network}/{measure}/nfe_{nfe}": value
            for measure, networks in measures.items()
            for network, values in networks.items()
            for nfe, value in values.items()
        }


class FinalReport(Callback):
    """Measures student and teacher on the validation prompts once training has ended, and reports.

    A table is printed; `summary.json` (see `Summary`) and `images.png` are written. The student is measured at the validated
    numbers of steps, the teacher at those and at `teacher_nfe`, from the same noise, which is not that of the validations: what
    was tuned by them is reported on fresh noise. Processes share the work. A run that ends by an exception, or a
    `fast_dev_run`, is not reported.

    Args:
        directory: Where the files go; None is the trainer's `default_root_dir`.
        noises: Pictures of each validation prompt that are measured, each from a noise of its own, at least 1.
        seed: First noise seed, far from those of validation, which count from `validation.seed`.
        columns: Different prompts in the grid of pictures, at least 1.
        diversity_prompts: Different prompts of which diversity is measured; 0 leaves it out.
        diversity_seeds: Pictures of each of these, at least 2.
        teacher: Whether the teacher is measured as well, which takes longest, and is the same after every run with the same
            validation. It is in `images.png` in any case.

    Attributes:
        summary: What was measured, once training has ended; None before, and where nothing was.

    Raises:
        ConfigurationError: If a setting is out of its range, or the method draws no pictures.
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
            raise ConfigurationError(f"FinalReport.noises is {noises}; each prompt needs at least 1")
        if columns < 1:
            raise ConfigurationError(f"FinalReport.columns is {columns}; the grid of pictures needs at least 1")
        if diversity_prompts < 0:
            raise ConfigurationError(f"FinalReport.diversity_prompts is {diversity_prompts}; 0 leaves diversity out")
        if diversity_seeds < 2:
            raise ConfigurationError(f"FinalReport.diversity_seeds is {diversity_seeds}; pictures differ from 2 upwards")
        self.directory = directory
        self.noises = noises
        self.seed = seed
        self.columns = columns
        self.diversity_prompts = diversity_prompts
        self.diversity_seeds = diversity_seeds
        self.teacher = teacher
        self.summary: Summary | None = None
        self._seconds = 0.0
        self._started: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a method without pictures."""
        sampling_method(self, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, measure and report; after `fit` itself Lightning has taken the module off its device."""
        self._seconds, self._started = self._elapsed(), None
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a helper of Trainer's constructor
            return
        module = sampling_method(self, pl_module)
        directory = Path(self.directory or trainer.default_root_dir)
        batches = list(validation_prompts(trainer))
        prompts = prompts_in_order(pair for batch in batches for pair in zip(*batch, strict=True))
        if not prompts:
            self._print(trainer, "Final report: there are no validation prompts, so nothing was measured.")
            return
        with evaluating(trainer, module):
            self.summary = summary = self._measure(module, batches, prompts)
            columns = different_prompts(prompts, self.columns)
            seeds = range(self.seed, self.seed + len(columns))
            rows = student_rows(module, columns, seeds) | teacher_row(module, columns, seeds)
        if trainer.is_global_zero:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
            image_grid(rows, columns).save(directory / "images.png")
        if module.metrics:
            self._print(trainer, report_table(summary, _title(module)))
        else:
            self._print(trainer, "Final report: model.metric is not set, so there are pictures and no accuracy.")
        self._print(trainer, f"Trained for {summary.minutes:.1f} minutes. See {directory}/images.png and summary.json.")

    def state_dict(self) -> dict[str, Any]:
        """The training time so far."""
        return {"seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from there."""
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
                overall = {n: values.pop("overall") for n, values in measured.items()}
                summary.categories[network] = measured
                setattr(summary, network, overall)
        if self.diversity_prompts:
            prompts = different_prompts(prompts, self.diversity_prompts)
            summary.diversity["student"] = {str(n): self._diversity(module, prompts, n, "student") for n in nfe}
            if with_teacher:
                summary.diversity["teacher"] = {str(teacher_nfe): self._diversity(module, prompts, teacher_nfe, "teacher")}
        return summary

    def _accuracy(
        self, module: TeacherStudentBase, batches: Sequence[PromptBatch], nfe: int, network: Network
    ) -> dict[str, float]:
        """The module's metric of a network's pictures at a number of steps, over the batches of all processes."""
        metric = copy.deepcopy(next(iter(module.metrics.values())))
        assert isinstance(metric, Metric)
        metric.reset()
        for places, prompts in batches:
            repeated = [prompt for prompt in prompts for _ in range(self.noises)]
            seeds = [self.seed + place * self.noises + i for place in places for i in range(self.noises)]
            metric.update(module.sample(repeated, nfe, seeds, network), repeated)
        return {name: float(value) for name, value in computed_values(metric).items()}

    def _diversity(self, module: TeacherStudentBase, prompts: Sequence[str], nfe: int, network: Network) -> float:
        # Every process draws all of them, since sharded networks need all, and its own figure counts.
        metric = PromptDiversity(sync_on_compute=False).to(module.device)
        for i, prompt in enumerate(prompts):
            seeds = range(self.seed + i * self.diversity_seeds, self.seed + (i + 1) * self.diversity_seeds)
            metric.update(module.sample([prompt] * len(seeds), nfe, seeds, network), [prompt] * len(seeds))
        return float(metric.compute())

    def _print(self, trainer: Trainer, content: Table | str) -> None:
        if trainer.is_global_zero:
            rich.get_console().print(content)


def validation_prompts(trainer: Trainer) -> Iterator[PromptBatch]:
    """This process's share of the prompts that validation has used."""
    if trainer.val_dataloaders is None:
        return
    loaders = CombinedLoader(trainer.val_dataloaders, "sequential").flattened
    for loader, limit in zip(loaders, trainer.num_val_batches, strict=True):
        for batch in islice(loader, None if math.isinf(limit) else int(limit)):
            yield batch["index"].tolist(), list(batch["prompt"])


def report_table(summary: Summary, title: str) -> Table:
    """A row for each network and number of steps, a column for each category, in percent."""
    names = list(dict.fromkeys(name for rows in summary.categories.values() for row in rows.values() for name in row))
    table = Table(title=title, box=box.SIMPLE, padding=0)  # fits a terminal of 80 columns
    table.add_column("")
    for name in ["steps", *names, "overall", *(["diversity"] if summary.diversity else [])]:
        table.add_column(name.replace("_", "\n"), justify="right")
    for network, rows in summary.categories.items():
        for nfe, categories in rows.items():
            cells = [f"{100 * categories[name]:.1f}" if name in categories else "" for name in names]
            cells.append(f"{100 * getattr(summary, network)[nfe]:.1f}")
            if summary.diversity:
                diversity = summary.diversity.get(network, {}).get(nfe)
                cells.append("" if diversity is None else f"{diversity:.3f}")
            table.add_row(network, nfe, *cells)
        table.add_section()
    return table


def _title(module: TeacherStudentBase) -> str:
    metric = next(iter(module.metrics.values()))
    return metric_name(metric).replace("_", " ").capitalize() + " on the validation prompts, %"
