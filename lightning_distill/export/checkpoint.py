"""`python -m lightning_distill export`: a checkpoint as a diffusers directory, without the machine that it was trained on."""

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from lightning_distill.errors import ConfigurationError
from lightning_distill.export.directory import ModelCard, check_export_directory, export_student
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.sharding.checkpoint import METADATA, REST, recover
from lightning_distill.teachers.streamed_weights import Read, stream_weights


@dataclass(frozen=True)
class CheckpointExport:
    """What is exported, and where to.

    Args:
        ckpt_path: A checkpoint of `fit`: a file, or the directory that a sharded strategy writes.
        directory: Where to; an earlier export there is replaced.
        weights: "average" for the average of the weights, "last" for the weights themselves; None is the average, if there is
            one.
        lora: Of a LoRA student: "merged" or "unmerged", as of `ExportPipeline`.
        max_shard_size: Largest file that is written, and about the memory that it takes.
    """

    ckpt_path: str
    directory: str = "student"
    weights: Literal["average", "last"] | None = None
    lora: Literal["merged", "unmerged"] = "merged"
    max_shard_size: str = "5GB"


def export_checkpoint(module: LightningModule, options: CheckpointExport) -> Path:
    """Write the student of a checkpoint as a pipeline directory.

    Weights go from the checkpoint's files to the pipeline's a file at a time, on the CPU, in one process, whatever strategy
    and number of processes have saved them. Text encoders and the autoencoder are loaded and written as `fit` does it. Students
    with LoRA need their base, and are built as a whole.

    Args:
        module: The method, with the settings that it was trained with.
        options: What is exported, and where to.

    Returns:
        The directory.

    Raises:
        ConfigurationError: If there is no such checkpoint, or it is of other settings.
    """
    if not isinstance(module, TeacherStudentBase) or not module.has_teacher:
        raise ConfigurationError(f"export writes students, and {type(module).__name__} trains none; give a method that distils")
    directory = check_export_directory(options.directory)
    module.adapter.check()
    module.adapter.check_student(module.student_options)
    names, read, step = _open(Path(options.ckpt_path))
    prefix = _prefix(options, names)
    stored = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    if module.student_options.lora is None:
        student = module.adapter.meta_student(module.student_options)
        _refuse_others(stored, student.state_dict())
        stream_weights(student, lambda names: _renamed(read, stored, names), options.max_shard_size)
        module.adapter.load()
    else:
        module.configure_model()
        student = module.student
        _refuse_others(stored, {name: p for name, p in student.named_parameters() if p.requires_grad})
        values = read(stored.values())
        student.load_state_dict({name: values[stored[name]] for name in stored}, strict=False)
    card = ModelCard(
        method=type(module).__name__,
        teacher=module.adapter.name,
        nfe=module.validation.nfe,
        height=module.validation.height,
        width=module.validation.width,
        guidance_scale=module.guidance.scale,
        steps=step,
        torch_dtype=module.adapter.weights_dtype,
        started_from=module.student_options.pretrained,
    )
    target = export_student(module.adapter, student, directory, card, options.lora)
    rank_zero_info(f"Exported the student of {options.ckpt_path} to {target}")
    return target


def _open(path: Path) -> tuple[list[str], Read, int]:
    """Names of a checkpoint's weights, how they are read, and the optimizer steps that it has seen."""
    recover(path.absolute())
    if (path / METADATA).is_file():
        metadata: dict[str, Any] = dict(FileSystemReader(path).read_metadata().state_dict_metadata)
        weights = {name.removeprefix("weights."): value for name, value in metadata.items() if name.startswith("weights.")}

        def read_parts(names: Iterable[str]) -> dict[str, Tensor]:
            known = {name: weights[name] for name in names}
            found = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in known.items()}
            dcp.load({"weights": found}, storage_reader=FileSystemReader(path), no_dist=True)
            return found

        step: int = torch.load(path / REST, map_location="cpu", weights_only=True)["global_step"]
        return list(weights), read_parts, step
    if not path.is_file():
        raise ConfigurationError(
            f"ckpt_path is {str(path)!r}, which is neither a checkpoint file nor the directory of a sharded run; give the "
            "checkpoint that fit has written"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"ckpt_path {str(path)!r} cannot be read ({reason}); give another checkpoint") from error
    state: dict[str, Tensor] = checkpoint["state_dict"]
    return list(state), lambda names: {name: state[name] for name in names}, checkpoint["global_step"]


def _prefix(options: CheckpointExport, names: Iterable[str]) -> str:
    averaged = any(name.startswith("networks.ema.module.") for name in names)
    if options.weights == "average" and not averaged:
        raise ConfigurationError(f"weights is average, and {options.ckpt_path!r} has none; set weights to last")
    return "networks.ema.module." if averaged and options.weights != "last" else "networks.student."


def _refuse_others(stored: Mapping[str, str], expected: Mapping[str, Tensor]) -> None:
    differing = sorted(stored.keys() ^ expected.keys())
    if differing:
        raise ConfigurationError(
            f"the checkpoint's student and that of this configuration differ in {differing[0]!r} and {len(differing) - 1} more "
            "weights; give the model settings it was trained with"
        )


def _renamed(read: Read, stored: Mapping[str, str], names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors by the student's names, of a checkpoint that has them under others."""
    values = read([stored[name] for name in names])
    return {name: values[stored[name]] for name in names}
