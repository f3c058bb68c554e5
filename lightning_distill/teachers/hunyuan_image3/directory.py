"""Directories of HunyuanImage 3.0 as they are published: one model, its code, tokenizer and weights side by side."""

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

from lightning_distill.students.few_step_hunyuan_image3 import FewStepHunyuanImage3
from lightning_distill.students.two_time_hunyuan_image3 import EMBEDDERS, TwoTimeHunyuanImage3
from lightning_distill.teachers.streamed_weights import Stream, save_in_files, stream_of

AUTO_CLASS = "AutoModelForCausalLM"
ENTRY = "hunyuan_image3_student"
"""Module of an export that joins this package's code with the published one."""
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
_ENTRY_CODE = '''"""The student as transformers loads it: the published model, with two times and a sampler of few steps."""

from .{module} import {published}
from .{own} import {base}


class {name}({base}, {published}):
    """HunyuanImage 3.0 in a few steps; see `draw`."""

    published = {published}
'''


def read_config(directory: Path) -> dict[str, Any]:
    """The settings of a directory, or none where it holds no model of transformers."""
    file = directory / "config.json"
    config: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return config


def is_hunyuan_image3(config: dict[str, Any]) -> bool:
    """Whether the settings are those of a published model, or of a student of one."""
    return config.get("model_type") == "hunyuan_image_3_moe" and AUTO_CLASS in config.get("auto_map", {})


def is_student(config: dict[str, Any]) -> bool:
    """Whether the settings are those of an exported student."""
    return "interval_embedding" in config


def published_class(directory: Path) -> type[nn.Module]:
    """The model class that the directory brings; this runs its code."""
    # transformers copies the code before it runs it, and processes that start together must not read half a copy.
    cache = Path(dynamic_module_utils.HF_MODULES_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(cache / "lightning_distill.lock"):
        name = read_config(directory)["auto_map"][AUTO_CLASS]
        kind: type[nn.Module] = dynamic_module_utils.get_class_from_dynamic_module(name, str(directory))
    return kind


def two_time_class(published: type[nn.Module], base: type[TwoTimeHunyuanImage3]) -> type[TwoTimeHunyuanImage3]:
    """A published class with this package's mixed in."""
    # Not registered with transformers, even where the published class is: it would be saved as if its file were its own.
    settings = {"published": published, "_auto_class": None, "__module__": base.__module__}
    return type(_class_name(published, base), (base, published), settings)


def _class_name(published: type[nn.Module], base: type[TwoTimeHunyuanImage3]) -> str:
    return f"{base.__name__.removesuffix('HunyuanImage3')}{published.__name__}"


def read_weights(directory: Path, names: set[str]) -> dict[str, Tensor]:
    """Tensors by name, from the files that hold them.

    Raises:
        KeyError: If one is missing.
    """
    places = _places(directory)
    if missing := sorted(names - places.keys()):
        raise KeyError(f"{directory} has no weights {missing}")
    tensors: dict[str, Tensor] = {}
    for name in sorted({places[each] for each in names}):
        with safe_open(directory / name, framework="pt") as file:
            tensors |= {each: file.get_tensor(each) for each in names if places[each] == name}
    return tensors


def missing_files(directory: Path) -> list[str]:
    """Files that a published directory should have and has not, as after a download that broke off."""
    index = directory / INDEX
    shards = set(_places(directory).values()) if index.is_file() else {"model.safetensors"}
    return sorted(name for name in {*shards, "generation_config.json", "tokenizer.json"} if not (directory / name).is_file())


def _places(directory: Path) -> dict[str, str]:
    """The file that holds each tensor."""
    index = directory / INDEX
    if index.is_file():
        places: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return places
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def save_model(network: TwoTimeHunyuanImage3, source: Path, directory: Path, settings: dict[str, Any]) -> None:
    """Write a network in the published layout, which `AutoModelForCausalLM` loads with `trust_remote_code=True`.

    Args:
        network: Its weights and configuration.
        source: The published directory, of which all that the network has not is kept.
        directory: Where to; made if it is not there.
        settings: Of a student, for its configuration. Without them it is the published model that is written.
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
        whole: Any = (two_time_class(published, FewStepHunyuanImage3) if settings else published)(config)
    directory.mkdir(parents=True, exist_ok=True)
    config.dtype = str(network.dtype).removeprefix("torch.")
    config.architectures = [type(whole).__name__]
    config.save_pretrained(directory)
    _save_weights(network, source, whole.state_dict(), directory)
    for file in source.iterdir():
        wanted = file.suffix in COPIED or file.name.lower().startswith(("license", "notice"))
        if file.is_file() and wanted and file.name != "config.json" and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, directory / file.name)
    if settings:
        _copy_own_code(published, directory)


def _save_weights(network: TwoTimeHunyuanImage3, source: Path, whole: dict[str, Tensor], directory: Path) -> None:
    """Write a network's weights, and the published ones of what it has not."""
    own, stream, dtype = network.state_dict(), stream_of(network), network.dtype
    if unknown := sorted(name for name, value in own.items() if name not in whole or whole[name].shape != value.shape):
        raise RuntimeError(f"the published model has no such weights as {unknown}")
    # In the precision in which transformers will load it all; a teacher's time embeddings are of a higher one.
    kept = {name for name in own if name.partition(".")[0] not in EMBEDDERS}
    state = {
        name: torch.empty(value.shape, dtype=own[name].dtype if name in kept else dtype, device="meta")
        for name, value in whole.items()
    }

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        found = stream.read([name for name in names if name in own])
        found |= read_weights(source, {name for name in names if name not in own})
        return {name: value if name in kept else value.to(dtype) for name, value in found.items()}

    save_in_files(state, Stream(read, stream.max_shard_size), directory, "model")


def _copy_own_code(published: type[nn.Module], directory: Path) -> None:
    own = Path(inspect.getfile(FewStepHunyuanImage3))
    for file in (own, *map(Path, get_relative_import_files(own))):
        shutil.copyfile(file, directory / file.name)
    code = _ENTRY_CODE.format(
        module=published.__module__.rpartition(".")[2],
        published=published.__name__,
        own=own.stem,
        base=FewStepHunyuanImage3.__name__,
        name=_class_name(published, FewStepHunyuanImage3),
    )
    (directory / f"{ENTRY}.py").write_text(code)
