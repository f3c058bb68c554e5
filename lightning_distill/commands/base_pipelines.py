"""Load LoRA weights, single transformers and LoRA students with the pipelines of their base models, for `sample`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from lightning_distill.commands.student_choice import read_mark
from lightning_distill.errors import ConfigurationError
from lightning_distill.export.mark import ExportMark
from lightning_distill.paths import expand_path
from lightning_distill.sharding.weight_files import WeightFilesError, safetensors_shapes
from lightning_distill.students.lora_student import LORA_WEIGHTS, PREFIX
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.families import FAMILIES
from lightning_distill.teachers.pipeline_directory import stock_network_class
from lightning_distill.teachers.pipeline_files import check_digests, stock_class
from lightning_distill.teachers.pipeline_source import PipelineSource
from lightning_distill.teachers.teacher_lora import SETTING, TeacherLora

ENDING = ".safetensors"


@dataclass(frozen=True)
class WeightFile:
    """A checked file with LoRA weights or a transformer.

    Attributes:
        source: Argument that names it.
        file: The file.
        mark: `export.json` beside it; None for files that are no exports.
        weight: Factor of LoRA updates.
    """

    source: PipelineSource
    file: Path
    mark: ExportMark | None
    weight: float = 1.0


def find_weights(path: str, argument: str, weight: float = 1.0) -> WeightFile:
    """Find and check the file of LoRA weights or of a transformer, without reading its tensors.

    Args:
        path: The file, or the directory with it.
        argument: Name of the argument, such as "--lora".
        weight: Factor of LoRA updates.

    Raises:
        ConfigurationError: If there is no such file, it is damaged, or the weight is not finite.
    """
    source = PipelineSource(argument, path)
    if not math.isfinite(weight):
        raise source.error(f"with the weight {weight}; give a finite weight, such as 1")
    place = Path(expand_path(path, argument))
    file = _only_file(place, source) if place.is_dir() else place
    if not file.is_file() or file.suffix.lower() != ENDING:
        raise source.error(f"which is no {ENDING} file; give such a file, or a directory with one")
    mark = read_mark(file.parent, source)
    if mark is not None and mark.kind == "lora_student" and argument != "--pipeline":
        raise source.error(
            "a student without its base, whose LoRA alone is incomplete; set --pipeline to it, and --base to its base"
        )
    if mark is not None:
        check_digests(file.parent, source)
    try:
        safetensors_shapes(file)
    except WeightFilesError as error:
        raise source.error(f"which {error}") from error
    return WeightFile(source, file, mark, weight)


def _only_file(directory: Path, source: PipelineSource) -> Path:
    files = sorted(directory.glob(f"*{ENDING}"))
    if directory / LORA_WEIGHTS in files:
        return directory / LORA_WEIGHTS
    if len(files) != 1:
        raise source.error(f"a directory with {len(files)} {ENDING} files; give one file")
    return files[0]


def checked_adapter(base: str, loras: Sequence[WeightFile]) -> DiffusersAdapter:
    """The pipeline of a base model, checked together with LoRA files before anything is loaded.

    Args:
        base: Shipped name, directory or hub id, with `@` and a revision of a hub id if needed.
        loras: LoRA files for its transformer.

    Raises:
        ConfigurationError: If the pipeline or a file is damaged, or they do not fit.
    """
    base, _, revision = base.partition("@")
    files = [TeacherLora(str(each.file), each.weight) for each in loras]
    adapter = DiffusersAdapter(base, revision=revision or None, lora=files)
    try:
        adapter.check()
    except ConfigurationError as error:
        message = str(error)
        for each in loras:
            message = message.replace(f"{SETTING} is {str(each.file)!r}", f"{each.source.setting} is {each.source.value!r}")
        raise ConfigurationError(message.replace(SETTING, "--lora").replace("adapter.pretrained", "--base")) from error
    return adapter


def load_base(
    name: str, base: str, torch_dtype: torch.dtype, loras: Sequence[WeightFile] = (), without: Sequence[str] = ()
) -> DiffusionPipeline:
    """Load the stock pipeline of a base model.

    Args:
        name: Value of the argument that names what is used with it.
        base: As in `checked_adapter`.
        torch_dtype: Dtype of the weights.
        loras: LoRA files, which are checked before the pipeline is loaded, and not applied.
        without: Components that are not loaded.

    Raises:
        ConfigurationError: If it cannot be loaded, or LoRA files do not fit.
    """
    try:
        adapter = checked_adapter(base, loras)
        pipeline: DiffusionPipeline = adapter.location.load_pipeline(adapter.family.stock_class, torch_dtype, without)
    except ConfigurationError as error:
        if not str(error).startswith("--base is "):
            raise
        raise ConfigurationError(
            f"{name} needs its base, which cannot be loaded ({str(error).removeprefix('--base is ')}); set --base to the "
            "directory or hub id of the base"
        ) from error
    return pipeline


def load_with_weights(files: Sequence[WeightFile], base: str | None, torch_dtype: torch.dtype) -> DiffusionPipeline:
    """Load the pipeline of a base with LoRA weights, or with a single transformer, and with the scheduler of an export.

    Args:
        files: LoRA files, or the file of a transformer and LoRA files.
        base: Shipped name, directory or hub id of the base; None takes it from the first export.
        torch_dtype: Dtype of the weights.

    Raises:
        ConfigurationError: If the base or a file cannot be loaded, or they do not fit.
    """
    named = [each.mark.base_model for each in files if each.mark is not None and each.mark.base_model]
    base = base or next(iter(named), None)
    first = files[0].source
    if base is None:
        raise first.error("whose base is unknown; set --base to the directory or hub id of its base")
    single = [each for each in files if each.mark is not None and each.mark.kind == "single_file"]
    name = f"{first.setting} {first.value!r}"
    loras = [each for each in files if each not in single]
    pipeline = load_base(name, base, torch_dtype, loras, ["transformer"] if single else [])
    for each in single:
        pipeline.register_modules(transformer=_single_transformer(each, pipeline, base, torch_dtype))
    add_lora_files(pipeline, loras)
    for each in files:
        if each.mark is not None and each.mark.scheduler is not None:
            pipeline.register_modules(scheduler=_scheduler(each.mark.scheduler, each.source))
    return pipeline


def _single_transformer(file: WeightFile, pipeline: DiffusionPipeline, base: str, torch_dtype: torch.dtype) -> Any:
    kind: Any = stock_network_class(FAMILIES[type(pipeline).__name__].network_class)
    path, _, revision = base.partition("@")
    location = DiffusersAdapter(path, revision=revision or None).location
    with file.source.loading("transformer"):
        return kind.from_single_file(
            str(file.file), config=location.path, revision=location.revision, subfolder="transformer", torch_dtype=torch_dtype
        )


def _scheduler(settings: Any, source: PipelineSource) -> Any:
    kind = stock_class("diffusers", str(settings.get("class")))
    if kind is None:
        raise source.error(f"whose export.json has the scheduler {settings.get('class')}, which diffusers does not know")
    with source.loading("scheduler"):
        return kind.from_config(settings["config"])


def add_lora_files(pipeline: DiffusionPipeline, files: Sequence[WeightFile]) -> None:
    """Load checked LoRA files into a stock pipeline, with their weights.

    Raises:
        ConfigurationError: If a file cannot be loaded.
    """
    if not files:
        return
    target: Any = _lora_target(pipeline)
    names = [f"lora_{i}" for i in range(len(files))]
    for name, each in zip(names, files, strict=True):
        where: dict[str, Any] = {"weight_name": each.file.name, "adapter_name": name}
        with each.source.loading("LoRA"):
            if target is pipeline:
                target.load_lora_weights(str(each.file.parent), **where)
            else:
                target.load_lora_adapter(str(each.file.parent), prefix=PREFIX.rstrip("."), **where)
    target.set_adapters(names, [each.weight for each in files])


def fuse_lora_files(pipeline: DiffusionPipeline, files: Sequence[WeightFile]) -> None:
    """Add LoRA files to the weights of a stock pipeline, as `add_lora_files`, for good."""
    if not files:
        return
    add_lora_files(pipeline, files)
    target: Any = _lora_target(pipeline)
    target.fuse_lora()
    (target.unload_lora_weights if target is pipeline else target.unload_lora)()


def _lora_target(pipeline: DiffusionPipeline) -> Any:
    """The pipeline, or its transformer: diffusers has no loader of LoRA for the pipeline of HunyuanImage 2.1."""
    return pipeline if hasattr(pipeline, "load_lora_weights") else pipeline.transformer
