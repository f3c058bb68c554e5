"""Formats of exported students: which exports a run or a command writes, and under which names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.export.lora_extraction import linear_layers
from lightning_distill.export.single_file import plan_single_file
from lightning_distill.export.tool_keys import Tool, check_tool_lora
from lightning_distill.suggestions import suggestion
from lightning_distill.teachers.model_adapter import ModelAdapter
from lightning_distill.teachers.student_options import StudentOptions

Format = Literal["any_step", "stock", "lora", "comfyui", "kohya", "single_file"]
FORMATS: tuple[Format, ...] = get_args(Format)
LORA_FORMATS: tuple[Format, ...] = ("lora", "comfyui", "kohya")
"""Formats that are LoRA files, for a base model."""
TOOLS: tuple[Tool, ...] = get_args(Tool)


@dataclass(frozen=True)
class FormatOptions:
    """Options of the formats.

    Args:
        formats: Formats to write. None: "stock" for the largest N and "any_step"; for LoRA students "lora" for each N.
        nfe: Numbers of steps N. Each format except "any_step" has one export for each N. None: those of validation.
        rank: Rank of the LoRA that is extracted from a student without LoRA, for the LoRA formats.
        lora: Form of a LoRA student in "any_step": "merged" for full weights, "unmerged" for only the trained weights.
    """

    formats: tuple[str, ...] | None = None
    nfe: tuple[int, ...] | None = None
    rank: int | None = None
    lora: Literal["merged", "unmerged"] = "merged"


@dataclass(frozen=True)
class PlannedExport:
    """One export.

    Attributes:
        format: Its format.
        nfe: Number of steps it is for; None means any.
    """

    format: Format
    nfe: int | None = None

    @property
    def folder(self) -> str:
        """Name of its folder beside other exports, such as `stock_4`."""
        return self.format if self.nfe is None else f"{self.format}_{self.nfe}"


def check_format_options(options: FormatOptions, prefix: str = "") -> None:
    """Check options before anything loads.

    Args:
        options: Options of the formats.
        prefix: Beginning of the names of the settings, such as "ExportPipeline.".

    Raises:
        ConfigurationError: If an option is invalid.
    """
    name = f"{prefix}{'formats' if prefix else 'format'}"
    for each in options.formats or ():
        if each not in FORMATS:
            raise ConfigurationError(f"{name} has {each!r}; {suggestion(each, FORMATS)}")
    if options.formats is not None and (not options.formats or len(set(options.formats)) < len(options.formats)):
        raise ConfigurationError(f"{name} is {list(options.formats)}; give each format once, or leave it out for the defaults")
    if options.nfe is not None and (not options.nfe or min(options.nfe) < 1 or len(set(options.nfe)) < len(options.nfe)):
        raise ConfigurationError(f"{prefix}nfe is {list(options.nfe)}; give different numbers of steps of at least 1")
    if options.rank is not None and options.rank < 1:
        raise ConfigurationError(f"{prefix}rank is {options.rank}; set it to at least 1 (64 is usual), or leave it out")
    if options.lora not in ("merged", "unmerged"):
        raise ConfigurationError(f"{prefix}lora is {options.lora!r}; choose merged or unmerged")


def plan_exports(
    options: FormatOptions, adapter: ModelAdapter, student: StudentOptions, validated: Sequence[int], prefix: str = ""
) -> list[PlannedExport]:
    """Exports of a student, checked before anything loads.

    Args:
        options: Options of the formats.
        adapter: The student's family, checked.
        student: Options of the student.
        validated: Numbers of steps of validation.
        prefix: Beginning of the names of the settings, such as "ExportPipeline.".

    Raises:
        ConfigurationError: If an option is invalid, or a format cannot represent the student.
    """
    check_format_options(options, prefix)
    name = f"{prefix}{'formats' if prefix else 'format'}"
    if options.lora == "unmerged" and student.lora is None:
        raise ConfigurationError(
            f"{prefix}lora is unmerged, but model.student.lora is null; set {prefix}lora to merged, or model.student.lora to "
            "LoRA options"
        )
    _check_use(options, prefix, name)
    obstacle = adapter.stock_obstacle(student)
    steps = sorted(validated if options.nfe is None else options.nfe)
    if options.formats is None:
        if obstacle is not None and options.nfe is not None:
            raise ConfigurationError(
                f"{prefix}nfe is {list(options.nfe)}, but {obstacle}, and the only export, any_step, is for any number of "
                f"steps; leave {prefix}nfe out"
            )
        if obstacle is not None:
            return [PlannedExport("any_step")]
        if student.lora is not None:
            return _per_step("lora", steps, adapter, student) if options.lora == "merged" else [PlannedExport("any_step")]
        return [PlannedExport("any_step"), PlannedExport("stock", steps[-1])]
    planned = []
    for each in FORMATS:
        if each not in options.formats:
            continue
        if each == "any_step":
            planned.append(PlannedExport(each))
            continue
        if obstacle is not None:
            raise ConfigurationError(f"{name} has {each}, but {obstacle}; choose any_step")
        if each in LORA_FORMATS and student.lora is None and options.rank is None:
            raise ConfigurationError(
                f"{name} has {each}, but the student has no LoRA; set {prefix}rank to extract one (64 is usual), or choose "
                "stock"
            )
        planned += _per_step(each, steps, adapter, student)
    if options.rank is not None and (student.lora is not None or not set(options.formats) & set(LORA_FORMATS)):
        raise ConfigurationError(
            f"{prefix}rank is {options.rank}, but no LoRA is extracted: the student has one, or {name} has none of "
            f"{', '.join(LORA_FORMATS)}; leave it out"
        )
    _check_layouts(planned, adapter, student)
    return planned


def _check_use(options: FormatOptions, prefix: str, name: str) -> None:
    """Check that the options are those of formats that are written."""
    unmerged = options.lora == "unmerged"
    if unmerged and options.formats is not None and "any_step" not in options.formats:
        raise ConfigurationError(
            f"{prefix}lora is unmerged, a form of any_step, but {name} is {list(options.formats)}; leave {prefix}lora out"
        )
    only_any_step = options.formats == ("any_step",) or (options.formats is None and unmerged)
    if only_any_step and options.nfe is not None:
        raise ConfigurationError(
            f"{prefix}nfe is {list(options.nfe)}, but the only export, any_step, is for any number of steps; leave {prefix}nfe "
            "out, or add a format"
        )


def _check_layouts(planned: Sequence[PlannedExport], adapter: ModelAdapter, student: StudentOptions) -> None:
    """Check that the layouts of other tools have all weights."""
    formats = {each.format for each in planned}
    if not formats & {"comfyui", "kohya", "single_file"}:
        return
    network = adapter.meta_stock_network()
    transformer = type(network).__name__
    if "single_file" in formats:
        plan_single_file(network.state_dict(), transformer, dict(network.config))
    targets = linear_layers(network) if student.lora is None else adapter.lora_target_names(student.lora)
    outputs = {name: part.out_features for name in targets if isinstance(part := network.get_submodule(name), nn.Linear)}
    for tool in TOOLS:
        if tool in formats:
            check_tool_lora(outputs, transformer, tool)


def _per_step(name: Format, steps: Sequence[int], adapter: ModelAdapter, student: StudentOptions) -> list[PlannedExport]:
    """One export for each N, or a single LoRA file for students that have their teacher's time embeddings."""
    if name in LORA_FORMATS and student.interval_embedding == "none" and adapter.stock_grid_is_free:
        return [PlannedExport(name)]
    return [PlannedExport(name, nfe) for nfe in steps]
