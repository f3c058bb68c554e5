"""Files of a pipeline directory: the index, and the components that it names, checked before anything is loaded."""

import inspect
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from transformers import PreTrainedModel

from lightning_distill.digests import MANIFEST, find_damage, read_manifest
from lightning_distill.students.average_velocity_scheduler import AverageVelocityScheduler
from lightning_distill.students.few_step import FewStepPipeline
from lightning_distill.teachers.component_files import check_component
from lightning_distill.teachers.families import FAMILIES
from lightning_distill.teachers.pipeline_source import PipelineSource

INDEX = "model_index.json"
_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}


@dataclass(frozen=True)
class PipelineFiles:
    """Components of a pipeline directory.

    Attributes:
        directory: The directory.
        components: Class of each component by name; None for code in the directory that is not of this package.
        variants: Variant of the weights of each component that has one, such as "fp16".
        absent: Names of the components that the pipeline does without, such as the T5 encoder of Stable Diffusion 3.
    """

    directory: Path
    components: Mapping[str, type[Any] | None]
    variants: Mapping[str, str]
    absent: tuple[str, ...]


def read_index(directory: Path, source: PipelineSource) -> dict[str, Any]:
    """Read `model_index.json`.

    Raises:
        ConfigurationError: If it is not the index of a pipeline.
    """
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise source.error(f"which has a {INDEX} that cannot be read ({error}); export or download it again") from error
    if not isinstance(index, dict) or not _is_class_name(index.get("_class_name")):
        raise source.error(f"whose {INDEX} is not the index of a pipeline; export or download it again")
    for name, value in index.items():
        if not name.startswith("_") and isinstance(value, list) and not _is_reference(value):
            raise source.error(f"whose {INDEX} has {value!r} for {name}, not a library and a class; download it again")
    return index


def pipeline_class_name(index: Mapping[str, Any]) -> str:
    """Name of the pipeline class of an index; exported students name a module and its class."""
    name = index["_class_name"]
    return str(name[-1] if isinstance(name, list) else name)


def component_classes(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of each component of an index that is not null."""
    listed = {name: value for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}
    return {name: (str(library), str(kind)) for name, (library, kind) in listed.items() if library and kind}


def check_pipeline(
    directory: Path,
    source: PipelineSource,
    *,
    variant: str | None = None,
    own_classes: bool = False,
    foreign_classes: bool = False,
    elsewhere: Collection[str] = (),
) -> PipelineFiles:
    """Check a pipeline directory without loading it: digests, index, components, and the headers of their weights.

    Args:
        directory: The directory.
        source: Setting that names it, for error messages.
        variant: Preferred variant of the weights.
        own_classes: Whether components may be of this package's classes, as those of exported students.
        foreign_classes: Whether components may be of classes of other files in the directory.
        elsewhere: Components that are not in this directory.

    Returns:
        The components.

    Raises:
        ConfigurationError: If the pipeline is incomplete or damaged, of no known class, or needs code that is not allowed.
    """
    check_digests(directory, source)
    index = read_index(directory, source)
    family = _family(index, source)
    absent = _absent(directory, index, family, source, elsewhere)
    components: dict[str, type[Any] | None] = {}
    variants: dict[str, str] = {}
    for name, (library, kind_name) in component_classes(index).items():
        if name in absent or name in elsewhere:
            continue
        kind = _component_class(library, kind_name, own_classes)
        if kind is None and not foreign_classes:
            raise source.error(
                f"whose {name} is the class {kind_name} of {library}, which is not a class of diffusers or transformers; code "
                "of pipeline directories is not run"
            )
        components[name] = kind
        if found := check_component(directory, name, kind, source, variant):
            variants[name] = found
    if variant is not None and variant not in variants.values():
        raise source.error(f"which has no weights of the variant {variant!r}; set variant to null")
    return PipelineFiles(directory, components, variants, absent)


def check_digests(directory: Path, source: PipelineSource) -> None:
    """Compare the files of an export with its digests; does nothing if it has none. The first process of a machine reads.

    The model card may be edited.

    Raises:
        ConfigurationError: If a file is missing or damaged.
    """
    if getattr(rank_zero_only, "rank", 0) or not (directory / MANIFEST).is_file():
        return
    state = tuple(sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in directory.rglob("*")))
    if damage := _damage(directory, state):
        raise source.error(
            f"which is damaged: {damage}; export or download it again, or delete {MANIFEST} if you changed the file"
        )


@cache
def _damage(directory: Path, state: tuple[tuple[str, int, int], ...]) -> str | None:
    """Damage of a directory whose files have these sizes and times; several commands of a process check it once."""
    try:
        names = [name for name in read_manifest(directory) if name != "README.md"]
    except ValueError as error:
        return str(error)
    return find_damage(directory, names)


def load_component(
    location: str,
    name: str,
    kind: type[Any],
    source: PipelineSource,
    dtype: Any,
    variant: str | None,
    revision: str | None = None,
) -> Any:
    """Load a component with a class of diffusers or transformers; weights are safetensors.

    Args:
        location: Directory or hub id of the pipeline.
        name: Name of the component.
        kind: Class of the component.
        source: Setting that names the pipeline, for error messages.
        dtype: Dtype of the weights.
        variant: Variant of the weights, such as "fp16".
        revision: Revision of a hub id.

    Raises:
        ConfigurationError: If the component cannot be loaded.
    """
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    if issubclass(kind, PreTrainedModel | ModelMixin):
        name_of_dtype = "dtype" if issubclass(kind, PreTrainedModel) else "torch_dtype"
        options |= {name_of_dtype: dtype, "use_safetensors": True, "variant": variant}
    load: Callable[..., Any] = kind.from_pretrained
    with source.loading(name):
        return load(location, subfolder=name, **options)


def stock_class(library: str, kind: str) -> type[Any] | None:
    """A class of diffusers or transformers by name; None if the library or the class is another one."""
    found = getattr(_LIBRARIES.get(library), kind, None)
    return found if inspect.isclass(found) else None


def _component_class(library: str, kind: str, own_classes: bool) -> type[Any] | None:
    own = {each.network_class.__name__: each.network_class for each in FAMILIES.values()}
    if own_classes and library not in _LIBRARIES:
        return AverageVelocityScheduler if kind == AverageVelocityScheduler.__name__ else own.get(kind)
    return stock_class(library, kind)


def _family(index: Mapping[str, Any], source: PipelineSource) -> type[FewStepPipeline] | None:
    """The family of an index; None for another pipeline of diffusers."""
    name = pipeline_class_name(index)
    students = {each.__name__: each for each in FAMILIES.values()}
    family = FAMILIES.get(name) or students.get(name)
    if family is None and isinstance(index["_class_name"], str) and stock_class("diffusers", name) is None:
        raise source.error(f"a {name}, which diffusers {diffusers.__version__} does not know; choose {', '.join(FAMILIES)}")
    return family


def _absent(
    directory: Path,
    index: Mapping[str, Any],
    family: type[DiffusionPipeline] | None,
    source: PipelineSource,
    elsewhere: Collection[str],
) -> tuple[str, ...]:
    """Components that the pipeline does without: null in the index, or optional and not downloaded."""
    present = component_classes(index)
    if family is None:
        return tuple(name for name, value in index.items() if isinstance(value, list) and name not in present)
    optional = family._optional_components
    parameters = inspect.signature(family.__init__).parameters.values()
    required = {each.name for each in parameters if each.default is each.empty and each.name != "self"} - set(optional)
    if lacking := sorted(required - present.keys() - set(elsewhere)):
        raise source.error(
            f"whose {INDEX} has no {lacking[0]}, which a {family.__name__} needs; download the complete pipeline"
        )
    missing = [name for name in optional if name in present and not (directory / name).is_dir() and name not in elsewhere]
    if missing:
        rank_zero_warn(f"{source.setting} {source.value!r} lacks the folders {', '.join(missing)}; they are left out")
    return tuple(name for name in optional if name in missing or (name in index and name not in present))


def _is_class_name(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and _is_reference(value) and None not in value)


def _is_reference(value: list[Any]) -> bool:
    return len(value) == 2 and all(part is None or isinstance(part, str) for part in value)
