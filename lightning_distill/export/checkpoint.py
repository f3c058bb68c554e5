"""`lightning-distill export`: convert a checkpoint to a pipeline directory, on any machine."""

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
from lightning_distill.export.card import ModelCard
from lightning_distill.export.directory import check_export_directory, export_student
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.sharding.checkpoint import METADATA, REST, recover
from lightning_distill.teachers.streamed_weights import Read, stream_weights


@dataclass(frozen=True)
class CheckpointExport:
    """Options of the export of a checkpoint.

    Args:
        ckpt_path: A checkpoint of `fit`: a file, or the directory of a sharded strategy.
        directory: Target directory; an earlier export in it is replaced.
        weights: "average" for the EMA, "last" for the weights without averaging. None: the EMA, if the checkpoint has one.
        lora: Format of a LoRA student: "merged" or "unmerged", as in `ExportPipeline`.
        max_shard_size: Largest size of an output file, which is also about the memory that the export takes.
    """

    ckpt_path: str
    directory: str = "student"
    weights: Literal["average", "last"] | None = None
    lora: Literal["merged", "unmerged"] = "merged"
    max_shard_size: str = "5GB"


def export_checkpoint(module: LightningModule, options: CheckpointExport) -> Path:
    """Write the student of a checkpoint as a pipeline directory.

    One process on the CPU copies the weights from the checkpoint to the pipeline, one output file at a time. The strategy and
    the number of processes that saved the checkpoint do not matter. Text encoders and the autoencoder are loaded and exported
    as in `fit`. A LoRA student needs its base model and is built in memory.

    Args:
        module: The method, with the settings of its training.
        options: Options of the export.

    Returns:
        The directory.

    Raises:
        ConfigurationError: If the method trains no student, or the directory has files that are not an earlier export. Also if
            the checkpoint does not exist, cannot be read, has no EMA for `weights` "average", or has other model settings.
    """
    if not isinstance(module, TeacherStudentBase) or not module.has_teacher:
        raise ConfigurationError(
            f"export writes students, but {type(module).__name__} trains no student; set model to a distillation method"
        )
    directory = check_export_directory(options.directory)
    module.adapter.check()
    module.adapter.check_student(module.student_options)
    names, read, step = _open(Path(options.ckpt_path))
    prefix = _prefix(options, names)
    stored = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    if module.student_options.lora is None:
        student = module.adapter.meta_student(module.student_options)
        _check_names(stored, student.state_dict())
        stream_weights(student, lambda names: _read_renamed(read, stored, names), options.max_shard_size)
        module.adapter.load()
    else:
        module.configure_model()
        student = module.student
        _check_names(stored, {name: p for name, p in student.named_parameters() if p.requires_grad})
        values = read(stored.values())
        student.load_state_dict({name: values[stored[name]] for name in stored}, strict=False)
    card = ModelCard.from_method(module, steps=step)
    target = export_student(module.adapter, student, directory, card, options.lora)
    rank_zero_info(f"Exported the student of {options.ckpt_path} to {target}")
    return target


def _open(path: Path) -> tuple[list[str], Read, int]:
    """Names of a checkpoint's weights, a function that reads them, and the checkpoint's number of optimizer steps."""
    recover(path.absolute())
    if (path / METADATA).is_file():
        metadata: dict[str, Any] = dict(FileSystemReader(path).read_metadata().state_dict_metadata)
        weights = {name.removeprefix("weights."): value for name, value in metadata.items() if name.startswith("weights.")}

        def read_shards(names: Iterable[str]) -> dict[str, Tensor]:
            requested = {name: weights[name] for name in names}
            tensors = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in requested.items()}
            dcp.load({"weights": tensors}, storage_reader=FileSystemReader(path), no_dist=True)
            return tensors

        step: int = torch.load(path / REST, map_location="cpu", weights_only=True)["global_step"]
        return list(weights), read_shards, step
    if not path.is_file():
        raise ConfigurationError(
            f"ckpt_path is {str(path)!r}, which is neither a checkpoint file nor the directory of a sharded run; set it to a "
            "checkpoint of fit"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"ckpt_path {str(path)!r} cannot be read ({reason}); set it to another checkpoint") from error
    state: dict[str, Tensor] = checkpoint["state_dict"]
    return list(state), lambda names: {name: state[name] for name in names}, checkpoint["global_step"]


def _prefix(options: CheckpointExport, names: Iterable[str]) -> str:
    has_ema = any(name.startswith("networks.ema.module.") for name in names)
    if options.weights == "average" and not has_ema:
        raise ConfigurationError(f"weights is average, but {options.ckpt_path!r} has no EMA; set weights to last")
    return "networks.ema.module." if has_ema and options.weights != "last" else "networks.student."


def _check_names(stored: Mapping[str, str], expected: Mapping[str, Tensor]) -> None:
    differing = sorted(stored.keys() ^ expected.keys())
    if differing:
        raise ConfigurationError(
            f"the student in the checkpoint and the student of this configuration differ in {differing[0]!r} and "
            f"{len(differing) - 1} more weights; use the model settings of the training"
        )


def _read_renamed(read: Read, stored: Mapping[str, str], names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors by their names in the student, from a checkpoint with other names."""
    values = read([stored[name] for name in names])
    return {name: values[stored[name]] for name in names}
