"""Read and write directories in the published layout of HunyuanImage 3.0: model code, tokenizer and weights in one folder."""

import copy
import inspect
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.dynamic_modules_utils import get_relative_import_files
from huggingface_hub.utils import WeakFileLock
from safetensors import safe_open
from torch import Tensor, nn
from transformers import dynamic_module_utils

from lightning_distill.errors import ConfigurationError
from lightning_distill.students.few_step_hunyuan_image3 import FewStepHunyuanImage3
from lightning_distill.students.two_time_hunyuan_image3 import EMBEDDERS, TwoTimeHunyuanImage3
from lightning_distill.teachers.streamed_weights import WeightStream, save_safetensors, weight_stream

AUTO_CLASS = "AutoModelForCausalLM"
ENTRY = "hunyuan_image3_student"
"""Module of an export that combines the code of this package with the published code."""
STUDENT_SETTINGS = (
    "interval_embedding",
    "time_frequency_bound",
    "interval_frequency_bound",
    "system_prompt",
    "max_sequence_length",
    "stochastic_sampling",
)
INDEX = "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
COPIED = (".py", ".json", ".txt", ".model", ".jinja")
_ENTRY_CODE = '''"""The student class that transformers loads: the published model with two times and a few-step sampler."""

from .{module} import {published}
from .{own} import {base}


class {name}({base}, {published}):
    """HunyuanImage 3.0 with a few-step sampler; see `sample_images`."""

    published = {published}
'''


def read_config(directory: Path) -> dict[str, Any]:
    """Read the configuration of a directory; empty if the directory has no transformers model.

    Raises:
        ConfigurationError: If it is not JSON.
    """
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{file} is not JSON ({error}); download the model again") from error
    return config if isinstance(config, dict) else {}


def is_hunyuan_image3(config: dict[str, Any]) -> bool:
    """Whether a configuration is of a published model or of its student."""
    return config.get("model_type") == "hunyuan_image_3_moe" and AUTO_CLASS in config.get("auto_map", {})


def is_student(config: dict[str, Any]) -> bool:
    """Whether a configuration is of an exported student."""
    return "interval_embedding" in config


def published_class(directory: Path) -> type[nn.Module]:
    """Import the model class of a directory; this runs the directory's code."""
    # transformers copies the code before it runs it. The lock prevents parallel processes from reading an incomplete copy.
    cache = Path(dynamic_module_utils.HF_MODULES_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(cache / "lightning_distill.lock"):
        name = read_config(directory)["auto_map"][AUTO_CLASS]
        kind: type[nn.Module] = dynamic_module_utils.get_class_from_dynamic_module(name, str(directory))
    return kind


def two_time_class(published: type[nn.Module], base: type[TwoTimeHunyuanImage3]) -> type[TwoTimeHunyuanImage3]:
    """Subclass of a published model class and a class of this package."""
    # Not registered with transformers, even if the published class is: saving would copy the wrong source file.
    settings = {"published": published, "_auto_class": None, "__module__": base.__module__}
    return type(_class_name(published, base), (base, published), settings)


def _class_name(published: type[nn.Module], base: type[TwoTimeHunyuanImage3]) -> str:
    return f"{base.__name__.removesuffix('HunyuanImage3')}{published.__name__}"


def read_weights(directory: Path, names: set[str]) -> dict[str, Tensor]:
    """Read tensors by name from the files of a directory.

    Raises:
        KeyError: If a tensor is missing.
    """
    weight_map = _weight_map(directory)
    if missing := sorted(names - weight_map.keys()):
        raise KeyError(f"{directory} has no weights {missing}")
    tensors: dict[str, Tensor] = {}
    for name in sorted({weight_map[each] for each in names}):
        with safe_open(directory / name, framework="pt") as file:
            tensors |= {each: file.get_tensor(each) for each in names if weight_map[each] == name}
    return tensors


def missing_files(directory: Path) -> list[str]:
    """Names of the files that a published directory lacks, as after an incomplete download."""
    index = directory / INDEX
    shards = set(_weight_map(directory).values()) if index.is_file() else {"model.safetensors"}
    return sorted(name for name in {*shards, "generation_config.json", "tokenizer.json"} if not (directory / name).is_file())


def _weight_map(directory: Path) -> dict[str, str]:
    """File name of each tensor."""
    index = directory / INDEX
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return weight_map
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def save_model(network: TwoTimeHunyuanImage3, source: Path, directory: Path, settings: dict[str, Any]) -> None:
    """Write a network in the published layout, which `AutoModelForCausalLM` loads with `trust_remote_code=True`.

    Args:
        network: The network, which gives weights and configuration.
        source: The published directory, which gives all files and weights that the network does not have.
        directory: Output directory; created if it does not exist.
        settings: Student settings for the configuration. Empty: the output is a published model.
    """
    published = network.published
    config = copy.deepcopy(network.config)
    for name in STUDENT_SETTINGS:
        if hasattr(config, name):
            delattr(config, name)
    vars(config).update(settings)
    config.auto_map = {**read_config(source)["auto_map"]}
    if settings:
        config.auto_map[AUTO_CLASS] = f"{ENTRY}.{_class_name(published, FewStepHunyuanImage3)}"
    with torch.device("meta"):
        model: Any = (two_time_class(published, FewStepHunyuanImage3) if settings else published)(config)
    directory.mkdir(parents=True, exist_ok=True)
    config.dtype = str(network.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    _save_weights(network, source, model.state_dict(), directory)
    for file in source.iterdir():
        wanted = file.suffix in COPIED or file.name.lower().startswith(("license", "notice"))
        if file.is_file() and wanted and file.name != "config.json" and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, directory / file.name)
    if settings:
        _copy_student_code(published, directory)


def _save_weights(network: TwoTimeHunyuanImage3, source: Path, full_state: dict[str, Tensor], directory: Path) -> None:
    """Write the weights of a network, and the published weights of all other modules."""
    state, stream, dtype = network.state_dict(), weight_stream(network), network.dtype
    if unknown := sorted(n for n, value in state.items() if n not in full_state or full_state[n].shape != value.shape):
        raise RuntimeError(f"the published model has no weights {unknown}")
    # Cast to the dtype in which transformers loads the model; time embeddings of a teacher have a higher precision.
    not_cast = {name for name in state if name.partition(".")[0] not in EMBEDDERS}
    full_state = {
        name: torch.empty(value.shape, dtype=state[name].dtype if name in not_cast else dtype, device="meta")
        for name, value in full_state.items()
    }

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        tensors = stream.read([name for name in names if name in state])
        tensors |= read_weights(source, {name for name in names if name not in state})
        return {name: value if name in not_cast else value.to(dtype) for name, value in tensors.items()}

    save_safetensors(full_state, WeightStream(read, stream.max_shard_size), directory, "model")


def _copy_student_code(published: type[nn.Module], directory: Path) -> None:
    source = Path(inspect.getfile(FewStepHunyuanImage3))
    for file in (source, *map(Path, get_relative_import_files(source))):
        shutil.copyfile(file, directory / file.name)
    code = _ENTRY_CODE.format(
        module=published.__module__.rpartition(".")[2],
        published=published.__name__,
        own=source.stem,
        base=FewStepHunyuanImage3.__name__,
        name=_class_name(published, FewStepHunyuanImage3),
    )
    (directory / f"{ENTRY}.py").write_text(code)
