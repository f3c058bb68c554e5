"""Files of one component of a pipeline: whether they are complete, and whether the weights fit the configuration."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from lightning_distill.errors import first_and_count
from lightning_distill.sharding.weight_files import WeightFiles, WeightFilesError, check_whole
from lightning_distill.teachers.meta_models import meta_model, stored_names
from lightning_distill.teachers.pipeline_source import PipelineSource

LARGEST_PARSED = 1 << 20
"""Largest JSON file that is parsed, in bytes; larger ones are vocabularies."""


def check_component(
    directory: Path, name: str, kind: type[Any] | None, source: PipelineSource, variant: str | None = None
) -> str | None:
    """Check the files of a component without reading its weights.

    Args:
        directory: Directory of the pipeline.
        name: Name of the component, such as "transformer"; "." if `directory` holds a single model.
        kind: Class of the component. None, for code that is not imported: the weights are not compared with a configuration.
        source: Setting that names the pipeline, for error messages.
        variant: Preferred variant of the weights.

    Returns:
        The variant to load; None for no variant, or for a component without weights.

    Raises:
        ConfigurationError: If a file is missing, damaged or incomplete, or the weights do not fit the configuration.
    """
    folder = directory / name
    label = "model" if name == "." else name
    if not folder.is_dir():
        raise source.error(f"which lacks the folder {name}; download the complete pipeline")
    try:
        for file in sorted(folder.glob("*.json")):
            check_whole(file)
            if file.stat().st_size <= LARGEST_PARSED:
                _check_json(file)
        if kind is not None and not issubclass(kind, nn.Module):
            if not any(path.is_file() for path in folder.iterdir()):
                raise WeightFilesError("has no files; download it again")
            return None
        if kind is None and not any(folder.glob("*.safetensors*")):
            return None
        weights = WeightFiles.of_component(folder, variant)
        shapes = weights.shapes()
    except WeightFilesError as error:
        raise source.error(f"whose {label} {error}") from error
    if kind is not None:
        with source.loading(label):
            misfit = _misfit(kind, folder, shapes)
        if misfit is not None:
            raise source.error(f"whose {label} {misfit}; download config.json and the weights again, from one version")
    return weights.variant


def _check_json(file: Path) -> None:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightFilesError(f"has a {file.name} that is not JSON ({error}); download it again") from error


def _misfit(kind: type[Any], folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first difference between the weights that a configuration describes and those in the files, as a clause."""
    if not (folder / "config.json").is_file():
        return "lacks config.json"
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        return None  # quantized weights have other names and shapes than the configuration describes
    if issubclass(kind, ModelMixin):
        with init_empty_weights(include_buffers=False):
            model = kind.from_config(kind.load_config(folder))
        found = dict(shapes)
        model._fix_state_dict_keys_on_load(found)  # older names, which loading renames alike
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    elif issubclass(kind, PreTrainedModel):
        model = meta_model(kind, folder, torch.float32)
        names = stored_names(model, shapes)
        if shapes.keys() - set(names.values()):
            return None  # loading merges some of these weights, so names and shapes differ
        expected = {name: tuple(value.shape) for name, value in model.named_parameters()}
        found = {name: shapes[stored] for name, stored in names.items()}
    else:
        return None
    if missing := [name for name in expected if name not in found]:
        return f"has files without the weight {first_and_count(missing)} of its config.json"
    if differing := [name for name, shape in expected.items() if found[name] != shape]:
        name = differing[0]
        return f"has {name} of shape {found[name]}, where its config.json has {expected[name]}"
    patterns = {_without_numbers(name) for name in expected}
    if more := [name for name in found if name not in expected and _without_numbers(name) in patterns]:
        return f"has weights of more layers than its config.json, such as {more[0]}"
    return None


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)
