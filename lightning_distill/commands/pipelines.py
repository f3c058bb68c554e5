"""Load pipelines for `sample`: exported students, with their code checked, stock pipelines, and LoRA on them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedModel

import lightning_distill.students
from lightning_distill.commands.base_pipelines import (
    WeightFile,
    add_lora_files,
    checked_adapter,
    find_weights,
    fuse_lora_files,
    load_base,
    load_with_weights,
)
from lightning_distill.commands.student_choice import ON_BASE, read_mark
from lightning_distill.errors import ConfigurationError
from lightning_distill.sharding.weight_files import WeightFilesError, safetensors_shapes
from lightning_distill.students.lora_student import LORA_WEIGHTS, SETTINGS, TIME_WEIGHTS, load_lora_student
from lightning_distill.teachers.component_files import check_component
from lightning_distill.teachers.families import FAMILIES
from lightning_distill.teachers.finite import check_finite
from lightning_distill.teachers.hunyuan_image3.directory import is_hunyuan_image3, published_class, read_config
from lightning_distill.teachers.hunyuan_image3.directory import is_student as is_student_config
from lightning_distill.teachers.pipeline_files import (
    INDEX,
    check_digests,
    check_pipeline,
    component_classes,
    load_component,
    pipeline_class_name,
    read_index,
    stock_class,
)
from lightning_distill.teachers.pipeline_source import PipelineSource
from lightning_distill.teachers.registry import SHIPPED, resolve_pretrained
from lightning_distill.teachers.shipped import has_shared_components, load_shipped_student, shared_components

OWN_CODE = Path(lightning_distill.students.__file__).parent
STUDENTS = {family.__name__ for family in FAMILIES.values()}
"""Class names of the students' pipelines."""


def load_pipeline(
    name: str | None,
    trust_remote_code: bool = False,
    torch_dtype: torch.dtype = torch.float32,
    base: str | None = None,
    loras: Sequence[WeightFile] = (),
) -> DiffusionPipeline | PreTrainedModel:
    """Load a pipeline or a student of HunyuanImage 3.0, to the GPU if there is one.

    Args:
        name: Shipped name or directory. None: the pipeline is the base.
        trust_remote_code: Whether to run Python files in the directory that are not of this package.
        torch_dtype: dtype of the weights.
        base: Base of a student that was exported without it: shipped name, directory or hub id; None means its teacher.
        loras: LoRA files for a stock pipeline, or for the base of a LoRA student whose teacher had them.

    Raises:
        ConfigurationError: If there is no pipeline of a known family, it is incomplete or damaged, has untrusted code or
            weights that are not finite, or its base is missing.
    """
    if name is None:
        source, pipeline = PipelineSource("--base", str(base)), load_with_weights(loras, base, torch_dtype)
    else:
        source = PipelineSource("--pipeline", name)
        pipeline = _load(source, trust_remote_code, torch_dtype, base, loras)
    modules = {"model": pipeline} if isinstance(pipeline, PreTrainedModel) else pipeline.components
    check_finite({name: part for name, part in modules.items() if isinstance(part, torch.nn.Module)}, source)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def _load(
    source: PipelineSource, trust_remote_code: bool, torch_dtype: torch.dtype, base: str | None, loras: Sequence[WeightFile]
) -> DiffusionPipeline | PreTrainedModel:
    name, directory = source.value, Path(resolve_pretrained(source.value))
    mark = read_mark(directory, source)
    if mark is not None and mark.kind in ON_BASE:
        return load_with_weights([find_weights(name, "--pipeline"), *loras], base, torch_dtype)
    is_whole = not (directory / SETTINGS).is_file()
    if is_whole and base is not None:
        raise ConfigurationError(f"--base is {base!r}, but --pipeline {name!r} is a complete pipeline; leave --base out")
    has_index = (directory / INDEX).is_file()
    if not is_whole:
        return _on_base(source, directory, base, torch_dtype, loras)
    if loras and not (has_index and isinstance(read_index(directory, source)["_class_name"], str)):
        raise ConfigurationError(
            f"--lora is {loras[0].source.value!r}, but --pipeline {name!r} is not a stock pipeline; leave --lora out, or "
            "export the student as stock or lora"
        )
    if not has_index:
        return _load_hunyuan_image3(source, directory, trust_remote_code, torch_dtype).eval()
    if loras:
        checked_adapter(name, loras)
    pipeline = _load_directory(source, directory, trust_remote_code, torch_dtype)
    add_lora_files(pipeline, loras)
    return pipeline


def is_student(pipeline: DiffusionPipeline) -> bool:
    """Whether a pipeline is a student's. Its class may come from its directory, so `isinstance` does not apply."""
    return hasattr(type(pipeline), "stock_class")


def _load_directory(
    source: PipelineSource, directory: Path, trust_remote_code: bool, torch_dtype: torch.dtype
) -> DiffusionPipeline:
    index = read_index(directory, source)
    kind = pipeline_class_name(index)
    if isinstance(index["_class_name"], str) and kind not in FAMILIES:
        raise source.error(f"a {kind}; choose an exported student, or one of {', '.join(FAMILIES)}")
    _check_foreign_code(source, directory, trust_remote_code)
    shared = has_shared_components(directory)
    files = check_pipeline(
        directory,
        source,
        own_classes=True,
        foreign_classes=trust_remote_code,
        elsewhere=shared_components(directory) if shared else (),
    )
    if shared:
        with source.loading("pipeline"):
            return load_shipped_student(source.value, torch_dtype)
    components: dict[str, Any] = dict.fromkeys(files.absent)
    for name, (library, kind_name) in component_classes(index).items():
        stock = stock_class(library, kind_name)
        if name not in components and stock is not None:
            variant = files.variants.get(name)
            components[name] = load_component(str(directory), name, stock, source, torch_dtype, variant)
    with source.loading("pipeline"):
        pipeline: DiffusionPipeline = DiffusionPipeline.from_pretrained(
            directory, torch_dtype=torch_dtype, use_safetensors=True, trust_remote_code=True, **components
        )
    if not is_student(pipeline) and type(pipeline).__name__ not in FAMILIES:  # of code that the user trusts
        raise source.error(f"a {type(pipeline).__name__}; choose an exported student, or one of {', '.join(FAMILIES)}")
    return pipeline


def _load_hunyuan_image3(
    source: PipelineSource, directory: Path, trust_remote_code: bool, torch_dtype: torch.dtype
) -> PreTrainedModel:
    config = read_config(directory)
    if not is_hunyuan_image3(config):
        raise source.error(f"which has no {INDEX}; choose a pipeline directory or one of {', '.join(SHIPPED)}")
    if not is_student_config(config):
        raise source.error("HunyuanImage 3.0 itself; sample by its generate_image, or choose an exported student")
    _check_foreign_code(source, directory, trust_remote_code)
    check_digests(directory, source)
    check_component(directory, ".", None, source)
    with source.loading("model"):
        # `AutoModelForCausalLM` would confuse different directories of the same name within one process.
        kind: Any = published_class(directory)
        model: PreTrainedModel = kind.from_pretrained(directory, dtype=torch_dtype, use_safetensors=True)
        model.load_tokenizer(str(directory))
    return model


def _on_base(
    source: PipelineSource, directory: Path, base: str | None, torch_dtype: torch.dtype, loras: Sequence[WeightFile]
) -> DiffusionPipeline:
    """Load a LoRA student on its base, with LoRA fused that its teacher had. Code in the directory is not run."""
    name = source.value
    check_digests(directory, source)
    with source.loading(SETTINGS):
        settings = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
        kind, stored_base, fused = settings["pipeline"][1], settings["base_model"], settings["base_lora"]
        needed = " and ".join(f"--lora {each['path']} {each['weight']:g}" for each in fused)
    if kind not in STUDENTS:
        raise ConfigurationError(
            f"--pipeline {name!r} has the pipeline class {kind}, which this version does not know; update lightning-distill"
        )
    if len(loras) != len(fused):
        lora = f"with LoRA; give {needed}" if fused else "without LoRA; leave --lora out"
        raise source.error(f"the student of a base {lora}")
    try:
        for file in (LORA_WEIGHTS, TIME_WEIGHTS):
            safetensors_shapes(directory / file)
    except WeightFilesError as error:
        raise source.error(f"which {error}") from error
    base = base or stored_base
    stock = load_base(f"--pipeline {name!r}", base, torch_dtype, loras)
    fuse_lora_files(stock, loras)
    with source.loading("weights"):
        try:
            return load_lora_student(stock, directory)
        except ValueError as error:
            raise ConfigurationError(f"--pipeline {name!r} does not fit the base {base!r}: {error}") from error


def _check_foreign_code(source: PipelineSource, directory: Path, trust_remote_code: bool) -> None:
    if not trust_remote_code and (foreign := foreign_code(directory)):
        raise ConfigurationError(
            f"--pipeline {source.value!r} brings code of its own ({', '.join(foreign)}); read it, and add --trust_remote_code "
            "to run it"
        )


def is_own_code(file: Path) -> bool:
    """Whether a file in a pipeline directory equals the file that this package exports, byte for byte."""
    own = OWN_CODE / file.name
    return own.is_file() and own.read_bytes() == file.read_bytes()


def foreign_code(directory: Path) -> list[str]:
    """Code that a trusted load could run besides this package's: files in the directory, and references to other places."""
    files = {file for pattern in ("*.py", "*/*.py", "**/*.py") for file in directory.glob(pattern)}
    foreign = [str(file.relative_to(directory)) for file in sorted(files) if not is_own_code(file)]
    # A plain module name refers to a file in the directory. Paths and other repositories refer to unchecked code.
    return foreign + [each for each in _code_references(directory) if not all(part.isidentifier() for part in each.split("."))]


def _code_references(directory: Path) -> Iterator[str]:
    """References to modules and classes in the index of a pipeline and the configs of its components."""
    index = directory / "model_index.json"
    for references in json.loads(index.read_text()).values() if index.is_file() else ():
        if isinstance(references, list):
            yield from (reference for reference in references if isinstance(reference, str))
    for file in sorted(directory.glob("**/*.json")):
        if '"auto_map"' in (text := file.read_text(errors="replace")):
            yield from _auto_maps(json.loads(text))


def _auto_maps(value: Any, inside: bool = False) -> Iterator[str]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _auto_maps(each, inside or name == "auto_map")
    elif isinstance(value, list):
        for each in value:
            yield from _auto_maps(each, inside)
    elif inside and isinstance(value, str):
        yield value
