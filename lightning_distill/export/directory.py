"""Exports: trained networks as directories that their libraries load, each with a model card."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from safetensors import safe_open
from torch import Tensor, nn

from lightning_distill.digests import write_manifest
from lightning_distill.errors import ConfigurationError, NonFiniteError
from lightning_distill.export.card import ModelCard
from lightning_distill.export.mark import MARK, ExportMark
from lightning_distill.export.readme import write_card
from lightning_distill.outputs import check_directory, directory_contents, sync, writing
from lightning_distill.paths import expand_path
from lightning_distill.sharding.weight_files import safetensors_shapes
from lightning_distill.students.lora_student import PREFIX, lora_layers, lora_weights, time_weights
from lightning_distill.teachers.families import two_time
from lightning_distill.teachers.finite import first_non_finite
from lightning_distill.teachers.model_adapter import ModelAdapter


def export_student(
    adapter: ModelAdapter,
    student: nn.Module,
    directory: str | Path,
    card: ModelCard,
    lora: Literal["merged", "unmerged"] = "merged",
) -> Path:
    """Write a student as a few-step pipeline, with the code that it needs.

    Any process with diffusers loads it by `DiffusionPipeline.from_pretrained(directory, trust_remote_code=True)`. For students
    of other libraries, the model card has the code that loads them.

    Args:
        adapter: The student's family, loaded.
        student: A two-time network.
        directory: Target directory. An earlier export in it is replaced.
        card: Contents of the README.
        lora: Format of a LoRA student. "merged" computes the merged weights in float32, which takes a copy of the full network
            in CPU memory. "unmerged" writes only the trained weights, which `load_lora_student` loads onto the base model.

    Returns:
        The directory.

    Raises:
        ConfigurationError: If the directory has files that are not an earlier export, or `lora` is "unmerged" and the student
            has no LoRA.
        NonFiniteError: If a weight is NaN or infinite.
    """
    if lora == "merged":
        check_export_directory(directory)
        merged = adapter.merge_lora(student)
        return _export(
            adapter, directory, "student", merged.state_dict(), card, lambda path: adapter.save_student(merged, path)
        )
    if not lora_layers(student):
        raise ConfigurationError("lora is unmerged, but the student has no LoRA; export it merged")
    network = two_time(student)
    trained = {f"{PREFIX}{name}": value for name, value in lora_weights(network).items()} | time_weights(network)
    return _export(adapter, directory, "lora_student", trained, card, lambda path: adapter.save_lora(student, path))


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
    return _export(adapter, directory, "teacher", network.state_dict(), card, lambda path: adapter.save_teacher(network, path))


def check_export_directory(directory: str | Path, setting: str = "directory") -> Path:
    """Check that an export to this directory is possible and would destroy no other files.

    Args:
        directory: Target directory.
        setting: Name of its setting, for error messages.

    Raises:
        ConfigurationError: If the directory cannot be written, or has files that are not an earlier export.
    """
    directory = Path(expand_path(str(directory), setting))
    check_directory(directory, setting)
    occupied = bool(directory_contents(directory)) if directory.is_dir() else directory.exists()
    if occupied and not (directory / MARK).is_file():
        raise ConfigurationError(
            f"{setting} is {str(directory)!r}, which has files that are not an earlier export; choose another directory, or "
            "empty it"
        )
    return directory


def _export(
    adapter: ModelAdapter,
    directory: str | Path,
    kind: str,
    weights: Mapping[str, Tensor],
    card: ModelCard,
    save: Callable[[Path], None],
) -> Path:
    """Write to a temporary sibling, check it, and rename: the target is the complete old export or the complete new one."""
    target = check_export_directory(directory).absolute()
    unfinished, replaced = (target.with_name(f".{target.name}.{state}") for state in ("unfinished", "replaced"))
    for leftover in (unfinished, replaced):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    student_arguments = {"guidance_scale": card.guidance_scale} if adapter.embeds_guidance else {}
    arguments = adapter.stock_arguments(card.guidance_scale) if kind == "teacher" else student_arguments
    with writing(target):
        try:
            unfinished.mkdir(parents=True)
            save(unfinished)
            write_card(unfinished, card, kind, arguments, adapter.export_code)
            ExportMark(kind, method=card.method).write(unfinished)
            _check_weights(unfinished, weights, target)
            write_manifest(unfinished)
            for path in (*unfinished.rglob("*"), unfinished):
                sync(path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)  # it would keep a full disk full
            raise
    if target.exists():
        os.replace(target, replaced)  # a rename cannot replace a directory that is not empty
    os.replace(unfinished, target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def _check_weights(directory: Path, weights: Mapping[str, Tensor], target: Path) -> None:
    """Check that one component, or the directory itself, has all weights, and that they are finite; reads the written files.

    Raises:
        NonFiniteError: If a weight is NaN or infinite.
    """
    expected = {(name, *value.shape) for name, value in weights.items()}
    for component in (directory, *(path for path in directory.iterdir() if path.is_dir())):
        shapes: set[tuple[object, ...]] = set()
        for file in component.glob("*.safetensors"):
            shapes |= {(name, *shape) for name, shape in safetensors_shapes(file).items()}
        if shapes >= expected:
            break
    else:
        raise RuntimeError(f"nothing was exported to {target}: the files written lack weights of the network")
    for file in component.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in weights.keys() & set(tensors.keys()):
                if first_non_finite({name: tensors.get_tensor(name)}):
                    raise NonFiniteError(
                        f"nothing was exported to {target}, because {name} is NaN or infinite; export an earlier checkpoint"
                    )
