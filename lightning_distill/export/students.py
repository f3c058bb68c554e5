"""Exports of students and teachers in their formats."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.export.card import ModelCard
from lightning_distill.export.directory import complete_export, replace_directory
from lightning_distill.export.formats import LORA_FORMATS, FormatOptions, PlannedExport
from lightning_distill.export.lora_extraction import extract_lora, linear_layers
from lightning_distill.export.lora_layers import LoraLayers, lora_layers_of, save_lora_file
from lightning_distill.export.mark import ExportMark
from lightning_distill.export.readme import base_name, write_overview
from lightning_distill.export.single_file import save_single_file
from lightning_distill.export.tool_keys import Tool, save_tool_lora, tool_keys
from lightning_distill.students.lora_student import LORA_WEIGHTS, PREFIX, lora_layers, lora_weights, time_weights
from lightning_distill.students.two_time import TwoTimeEmbedding
from lightning_distill.teachers.families import two_time
from lightning_distill.teachers.model_adapter import ModelAdapter
from lightning_distill.teachers.stock_student import (
    StockSource,
    save_stock_student,
    stock_network,
    stock_scheduler,
    time_updates,
)
from lightning_distill.teachers.streamed_weights import weight_stream
from lightning_distill.teachers.time_update import TimeUpdate, as_layers

TRANSFORMER_FILE = "transformer.safetensors"
"""File of the format "single_file"."""
_RENOISE = (
    "Its steps predict x0 and re-noise it. Stock pipelines draw that noise from torch's global generator: call "
    "`torch.manual_seed` for repeatable images."
)


@dataclass(frozen=True)
class Written:
    """A written format.

    Attributes:
        kind: Its kind in `export.json`.
        weights: Tensors with the names and shapes of the weights; None if they have other names.
        card: Contents of the README.
        arguments: Arguments of the pipeline besides prompt, steps and size.
        mark: Further contents of `export.json`.
    """

    kind: str
    weights: Mapping[str, Tensor] | None
    card: ModelCard
    arguments: Mapping[str, object]
    mark: Mapping[str, Any] = field(default_factory=dict)


def export_student(
    adapter: ModelAdapter,
    student: nn.Module,
    directory: str | Path,
    card: ModelCard,
    planned: Sequence[PlannedExport] = (PlannedExport("any_step"),),
    options: FormatOptions = FormatOptions(),
) -> Path:
    """Write a student in one format, or in several to subfolders of their names.

    Args:
        adapter: The student's family, loaded.
        student: A two-time network.
        directory: Target directory. An earlier export in it is replaced.
        card: Contents of the README.
        planned: Exports to write, from `plan_exports`.
        options: Options of the formats.

    Returns:
        The directory.

    Raises:
        ConfigurationError: If the directory has files that are not an earlier export, or a format cannot represent the student.
            The other formats are written in the latter case.
        NonFiniteError: If a weight is NaN or infinite.
    """
    target = Path(directory)
    exporter = StudentExporter(adapter, student, card, options)
    if len(planned) == 1:
        return replace_directory(target, lambda path: exporter.write(planned[0], path, target))
    errors: list[ConfigurationError] = []

    def write(path: Path) -> None:
        for each in planned:
            folder = path / each.folder
            folder.mkdir()
            try:
                exporter.write(each, folder, target / each.folder)
            except ConfigurationError as error:
                errors.append(error)
                shutil.rmtree(folder)
        if len(errors) == len(planned):
            raise errors[0]
        write_overview(path, card, adapter.export_code.library)
        ExportMark("several", method=card.method).write(path)

    result = replace_directory(target, write)
    if errors:
        raise errors[0]
    return result


def export_teacher(adapter: ModelAdapter, network: nn.Module, directory: str | Path, card: ModelCard) -> Path:
    """Write a one-time network as a stock pipeline of its family; diffusers loads it without further code.

    Args:
        adapter: The network's family, loaded; its text encoders and autoencoder are exported with the network.
        network: A network without an interval input.
        directory: Target directory. An earlier export in it is replaced.
        card: Contents of the README.

    Returns:
        The directory.

    Raises:
        ConfigurationError: If the directory has files that are not an earlier export.
    """
    target = Path(directory)

    def write(path: Path) -> None:
        adapter.save_teacher(network, path)
        arguments = adapter.stock_arguments(card.guidance_scale)
        mark = ExportMark("teacher", method=card.method)
        complete_export(path, target, mark, network.state_dict(), card, arguments, adapter.export_code)

    return replace_directory(target, write)


class StudentExporter:
    """Writes formats of one student; what several formats need is computed once.

    Args:
        adapter: The student's family, loaded.
        student: A two-time network.
        card: Contents of the README.
        options: Options of the formats.
    """

    def __init__(self, adapter: ModelAdapter, student: nn.Module, card: ModelCard, options: FormatOptions) -> None:
        self.adapter = adapter
        self.student = student
        self.card = card
        self.options = options
        self._updates: dict[int, list[TimeUpdate]] = {}

    def write(self, planned: PlannedExport, directory: Path, target: Path) -> None:
        """Write an export to an empty directory.

        Args:
            planned: Format and number of steps.
            directory: Where to write.
            target: Where the directory is moved to, for error messages.

        Raises:
            ConfigurationError: If the format cannot represent the student.
            NonFiniteError: If a weight is NaN or infinite.
        """
        if planned.format == "any_step":
            written = self._any_step(directory)
        else:
            nfe = planned.nfe or max(self.card.nfe)
            write = {"stock": self._stock, "single_file": self._single_file}.get(planned.format, self._lora)
            written = write(planned, nfe, directory)
        mark = ExportMark(written.kind, method=self.card.method, **written.mark)
        complete_export(directory, target, mark, written.weights, written.card, written.arguments, self.adapter.export_code)

    @cached_property
    def _merged(self) -> nn.Module:
        return self.adapter.merge_lora(self.student)

    @cached_property
    def _source(self) -> StockSource:
        return self.adapter.stock_source(self.student, self.card.height, self.card.width)

    @property
    def _merged_source(self) -> StockSource:
        return replace(self._source, student=two_time(self._merged))

    def _time_updates(self, nfe: int) -> list[TimeUpdate]:
        if nfe not in self._updates:
            self._updates[nfe] = time_updates(self._source, nfe)
        return self._updates[nfe]

    def _any_step(self, directory: Path) -> Written:
        arguments = {"guidance_scale": self.card.guidance_scale} if self.adapter.embeds_guidance else {}
        if self.options.lora == "merged":
            merged = self._merged
            self.adapter.save_student(merged, directory)
            return Written("any_step", merged.state_dict(), self.card, arguments)
        if not lora_layers(self.student):
            raise ConfigurationError("lora is unmerged, but the student has no LoRA; export it merged")
        network = two_time(self.student)
        trained = {f"{PREFIX}{name}": value for name, value in lora_weights(network).items()} | time_weights(network)
        self.adapter.save_lora(self.student, directory)
        return Written("lora_student", trained, self.card, arguments)

    def _stock(self, planned: PlannedExport, nfe: int, directory: Path) -> Written:
        network = save_stock_student(self._merged_source, nfe, self._time_updates(nfe), directory)
        return self._written(planned, nfe, network.state_dict())

    def _single_file(self, planned: PlannedExport, nfe: int, directory: Path) -> Written:
        network = stock_network(self._merged_source, self._time_updates(nfe))
        source = weight_stream(network).read, type(network).__name__, network.config
        save_single_file(network.state_dict(), *source, directory / TRANSFORMER_FILE)
        return self._written(planned, nfe, None, file=TRANSFORMER_FILE)

    def _lora(self, planned: PlannedExport, nfe: int, directory: Path) -> Written:
        layers, error = self._lora_layers
        layers = layers | as_layers(self._time_updates(nfe))
        if not layers:
            raise ConfigurationError("the student equals its teacher, so there is no LoRA to export; train it first")
        if planned.format == "lora":
            save_lora_file(layers, directory)
            weights = {
                f"{PREFIX}{name}.lora_{part}.weight": pair[i] for name, pair in layers.items() for i, part in enumerate("AB")
            }
            return self._written(planned, nfe, weights, lora_error=error)
        transformer = type(self.adapter.meta_stock_network()).__name__
        tool: Tool = "comfyui" if planned.format == "comfyui" else "kohya"
        save_tool_lora(layers, transformer, tool, directory / LORA_WEIGHTS)
        notes = "\n\n".join(filter(None, [self.card.notes, tool_keys(transformer, tool).note]))
        return self._written(planned, nfe, None, lora_error=error, notes=notes)

    @cached_property
    def _lora_layers(self) -> tuple[LoraLayers, float | None]:
        """LoRA of the student without the time update, and the error that its extraction makes."""
        if lora_layers(self.student):
            return lora_layers_of(self.student), None
        assert self.options.rank is not None, "plan_exports checks this"
        source, network = self._source, self.adapter.meta_stock_network()
        times = tuple(f"{name}." for name, part in source.teacher.named_modules() if isinstance(part, TwoTimeEmbedding))
        shapes = {name: value.shape for name, value in network.named_parameters() if not name.startswith(times)}
        read = weight_stream(source.student).read
        extracted = extract_lora(
            lambda name: read([name])[name].reshape(shapes[name]).cpu(),
            source.weights.read,
            shapes,
            [name for name in linear_layers(network) if not name.startswith(times)],
            self.options.rank,
        )
        return extracted.layers, extracted.error

    def _written(self, planned: PlannedExport, nfe: int, weights: Mapping[str, Tensor] | None, **fields: Any) -> Written:
        """A stock format with its time update, scheduler and arguments."""
        adapter, source, updates = self.adapter, self._source, self._time_updates(nfe)
        scheduler = stock_scheduler(source.family, source.grid(nfe))
        config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        described = {"class": type(scheduler).__name__, "config": config}
        arguments = adapter.stock_arguments(self.card.guidance_scale if adapter.embeds_guidance else 1.0)
        notes = fields.pop("notes", self.card.notes)
        if source.stochastic_sampling:
            notes = "\n\n".join(filter(None, [notes, _RENOISE]))
        card = replace(
            self.card,
            notes=notes,
            nfe=self.card.nfe if planned.nfe is None else (planned.nfe,),
            scheduler=described,
            residual=max((update.residual for update in updates), default=None),
            condition_number=max((update.condition_number for update in updates), default=None),
            **fields,
        )
        mark = {
            "nfe": None if planned.nfe is None else (planned.nfe,),
            "base_model": None if planned.format == "stock" else base_name(self.card.teacher),
            "base_lora": [{"path": each.name, "weight": each.weight} for each in self.card.teacher_lora]
            if planned.format in LORA_FORMATS
            else [],
            "arguments": arguments,
            "height": self.card.height,
            "width": self.card.width,
            "scheduler": None if planned.format == "stock" else described,
        }
        return Written(planned.format, weights, card, arguments, mark)
