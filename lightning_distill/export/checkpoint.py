"""`lightning-distill export`: convert a checkpoint to a pipeline directory, on any machine."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_distill.errors import ConfigurationError, first_and_count
from lightning_distill.export.card import ModelCard
from lightning_distill.export.directory import check_export_directory
from lightning_distill.export.formats import FormatOptions, plan_exports
from lightning_distill.export.students import export_student
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.methods.checkpoint_state import Shape, check_lora_rank, check_shapes
from lightning_distill.sharding.checkpoint_files import (
    check_undamaged,
    local_path,
    read_checkpoint,
    recover,
)
from lightning_distill.sharding.finite import non_finite
from lightning_distill.sharding.shard_reader import ShardReader, load_shards
from lightning_distill.teachers.streamed_weights import Read, stream_weights


@dataclass(frozen=True)
class CheckpointExport:
    """Options of the export of a checkpoint.

    Args:
        ckpt_path: A checkpoint of `fit`: a file, or the directory of a sharded strategy.
        directory: Target directory; an earlier export in it is replaced.
        weights: "average" for the EMA, "last" for the weights without averaging. None: the EMA, if the checkpoint has one.
        format: "any_step" for any number of steps, with code; "stock", a pipeline of diffusers without code;
            "lora", "comfyui" and "kohya", LoRA files for these tools; "single_file", the transformer in its original layout.
            One export is written to `directory`, several to its subfolders. None: "stock" for the largest number of steps and
            "any_step"; for LoRA students "lora" for each number of steps.
        nfe: Numbers of steps, each with exports of its own, except for "any_step". None: those of validation.
        rank: Rank of a LoRA that is extracted from a student without LoRA.
        lora: Form of a LoRA student in "any_step": "merged" for full weights, "unmerged" for only the trained weights.
        max_shard_size: Largest size of an output file, such as "500MB", which is also about the memory that the export takes.
        push_to_hub: Repository of the Hugging Face hub, as owner/name, to which the directory is uploaded after the export. It
            is created if it does not exist. The token is that of `hf auth login` or HF_TOKEN.
        public: Whether that repository is public.

    Raises:
        ConfigurationError: If `max_shard_size` is not a size above 0 in KB, MB, GB or TB, or `public` is set without
            `push_to_hub`.
    """

    ckpt_path: str
    directory: str = "student"
    weights: Literal["average", "last"] | None = None
    format: list[str] | None = None
    nfe: list[int] | None = None
    rank: int | None = None
    lora: Literal["merged", "unmerged"] = "merged"
    max_shard_size: str = "5GB"
    push_to_hub: str | None = None
    public: bool = False

    def __post_init__(self) -> None:
        size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[KMGT]B\s*", self.max_shard_size, re.IGNORECASE)
        if size is None or float(size[1]) == 0:
            raise ConfigurationError(
                f"max_shard_size is {self.max_shard_size!r}; set it to a number above 0 with KB, MB, GB or TB, such as 5GB"
            )
        if self.public and self.push_to_hub is None:
            raise ConfigurationError("public is true, but push_to_hub is not set; set it to owner/name, or leave public out")

    @property
    def formats(self) -> FormatOptions:
        """Options of the formats."""
        formats = None if self.format is None else tuple(self.format)
        return FormatOptions(formats, None if self.nfe is None else tuple(self.nfe), self.rank, self.lora)


def export_checkpoint(module: LightningModule, options: CheckpointExport, card_fields: Mapping[str, Any] | None = None) -> Path:
    """Write the student of a checkpoint as a pipeline directory.

    One process on the CPU copies the weights from the checkpoint to the pipeline, one output file at a time. The strategy and
    the number of processes that saved the checkpoint do not matter. Text encoders and the autoencoder are loaded and exported
    as in `fit`. A LoRA student needs its base model and is built in memory.

    Args:
        module: The method, with the settings of its training.
        options: Options of the export.
        card_fields: Fields of the model card that state other values than the settings of the method.

    Returns:
        The directory.

    Raises:
        ConfigurationError: If the method trains no student, or the directory has files that are not an earlier export. Also if
            the checkpoint does not exist, cannot be read, is damaged, has weights that are not
            finite, has no EMA for `weights` "average", or has other model settings.
    """
    if not isinstance(module, TeacherStudentBase) or not module.has_teacher:
        raise ConfigurationError(
            f"export writes students, but {type(module).__name__} trains no student; set model to a distillation method"
        )
    directory = check_export_directory(options.directory)
    module.adapter.check()
    module.adapter.check_student(module.student_options)
    planned = plan_exports(options.formats, module.adapter, module.student_options, module.validation.nfe)
    names, read, step = _open(options.ckpt_path)
    prefix = _prefix(options, names)
    stored = {each.removeprefix(prefix): each for each in names if each.startswith(prefix)}
    name = f"ckpt_path {options.ckpt_path!r}"
    if module.student_options.lora is None:
        student = module.adapter.meta_student(module.student_options)
        _check_weights(stored, names, student.state_dict(), name)
        stream_weights(student, lambda requested: _read_renamed(read, stored, requested), options.max_shard_size)
        module.adapter.load()
    else:
        check_lora_rank({each: names[each] for each in stored.values()}, module.student_options.lora.rank, name)
        module.configure_model()
        student = module.student
        _check_weights(stored, names, {path: p for path, p in student.named_parameters() if p.requires_grad}, name)
        values = read(stored.values())
        student.load_state_dict({path: values[original] for path, original in stored.items()}, strict=False)
    card = replace(ModelCard.from_method(module, steps=step), **(card_fields or {}))
    target = export_student(module.adapter, student, directory, card, planned, options.formats)
    rank_zero_info(f"Exported the student of {options.ckpt_path} to {target}")
    return target


def local_checkpoint(ckpt_path: str) -> Path:
    """Path of a checkpoint on this machine, restored if a process was killed while it replaced it.

    Raises:
        ConfigurationError: If it is on another one.
    """
    path = local_path(ckpt_path)
    if path is None:
        raise ConfigurationError(f"ckpt_path {ckpt_path!r} is not a local path; copy the checkpoint to this machine first")
    recover(path.absolute())
    return path


def _open(ckpt_path: str) -> tuple[dict[str, Shape], Read, int]:
    """Shapes of a checkpoint's weights by name, a function that reads them, and the checkpoint's number of optimizer steps."""
    path = local_checkpoint(ckpt_path)
    rest = read_checkpoint(path, mmap=True)
    step: int = rest["global_step"]
    if not path.is_dir():
        state: dict[str, Tensor] = rest["state_dict"]
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        return shapes, lambda names: {name: _finite(name, state[name], ckpt_path) for name in names}, step
    check_undamaged(path)
    metadata: dict[str, Any] = dict(ShardReader(path).read_metadata().state_dict_metadata)
    weights = {name.removeprefix("weights."): value for name, value in metadata.items() if name.startswith("weights.")}

    def read_shards(names: Iterable[str]) -> dict[str, Tensor]:
        requested = {name: weights[name] for name in names}
        tensors = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in requested.items()}
        load_shards({"weights": tensors}, path, no_dist=True)
        return {name: _finite(name, value, ckpt_path) for name, value in tensors.items()}

    return {name: tuple(value.size) for name, value in weights.items()}, read_shards, step


def _finite(name: str, value: Tensor, ckpt_path: str) -> Tensor:
    if non_finite({name: value}):
        raise ConfigurationError(
            f"the weight {name!r} of ckpt_path {ckpt_path!r} is not finite; set ckpt_path to an earlier checkpoint"
        )
    return value


def _prefix(options: CheckpointExport, names: Iterable[str]) -> str:
    has_ema = any(name.startswith("networks.ema.module.") for name in names)
    if options.weights == "average" and not has_ema:
        raise ConfigurationError(f"weights is average, but {options.ckpt_path!r} has no EMA; set weights to last")
    return "networks.ema.module." if has_ema and options.weights != "last" else "networks.student."


def _check_weights(
    stored: Mapping[str, str], shapes: Mapping[str, Shape], expected: Mapping[str, Tensor], checkpoint: str
) -> None:
    """Compare names and shapes of the student's weights in a checkpoint with those of this configuration."""
    differing = sorted(stored.keys() ^ expected.keys())
    if differing:
        raise ConfigurationError(
            f"the student of {checkpoint} and that of this configuration differ in the weight {first_and_count(differing)}; "
            "use the model settings it was trained with"
        )
    # ZeRO-3 stores flattened weights.
    shaped = {name: tuple(value.shape) for name, value in expected.items()}
    found = {name: shapes[original] for name, original in stored.items()}
    flat = [name for name, shape in shaped.items() if found[name] == (math.prod(shape),)]
    check_shapes(found | {name: shaped[name] for name in flat}, shaped, checkpoint)


def _read_renamed(read: Read, stored: Mapping[str, str], names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors by their names in the student, from a checkpoint with other names."""
    values = read([stored[name] for name in names])
    return {name: values[stored[name]] for name in names}
