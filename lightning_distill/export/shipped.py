"""The shipped student as a stock pipeline of diffusers, with one small LoRA file for each number of steps."""

import shutil
from pathlib import Path

from diffusers import DiffusionPipeline

from lightning_distill.digests import write_manifest
from lightning_distill.export.lora_layers import save_lora_file
from lightning_distill.export.mark import MARK
from lightning_distill.sharding.stored_weights import StoredWeights
from lightning_distill.students.few_step import FewStepPipeline
from lightning_distill.students.few_step_components import pipeline_arguments
from lightning_distill.teachers.registry import resolve_pretrained
from lightning_distill.teachers.shipped import load_shipped_student, shared_base
from lightning_distill.teachers.stock_student import (
    StockSource,
    save_stock_student,
    stock_network,
    stock_scheduler,
    time_updates,
)
from lightning_distill.teachers.streamed_weights import weight_stream
from lightning_distill.teachers.time_update import as_layers

STEPS = (1, 2, 4)
"""Numbers of steps with a time update."""


def save_shipped_student(name: str, directory: str | Path) -> None:
    """Write a shipped student as a stock pipeline, which needs no code of this package.

    All numbers of steps share the weights of the pipeline. For N steps, `load_lora_weights` adds the time update in
    `time_update_N.safetensors`.

    Args:
        name: A shipped name ("shapes-student").
        directory: Where to write; created if missing. Files of the same names are replaced.

    Raises:
        OSError: If a component is missing or not in safetensors.
    """
    shipped, directory = Path(resolve_pretrained(name)), Path(directory)
    source = _source(shipped, load_shipped_student(name))
    save_stock_student(source, max(STEPS), (), directory)
    for nfe in STEPS:
        file = save_lora_file(as_layers(time_updates(source, nfe)), directory)
        file.replace(directory / f"time_update_{nfe}.safetensors")
    for card in ("README.md", MARK):
        shutil.copyfile(shipped / card, directory / card)
    write_manifest(directory)


def stock_form(name: str, pipeline: FewStepPipeline, nfe: int) -> DiffusionPipeline:
    """A shipped student as the stock pipeline of `save_shipped_student` with the time update for N steps.

    Args:
        name: A shipped name ("shapes-student").
        pipeline: Result of `load_shipped_student`.
        nfe: Number of steps, one of `STEPS`.
    """
    source = _source(Path(resolve_pretrained(name)), pipeline)
    network = stock_network(source, time_updates(source, nfe))
    dtype = pipeline.transformer.dtype
    weights = weight_stream(network).read(network.state_dict())
    network.load_state_dict({path: value.to(dtype) for path, value in weights.items()}, assign=True)
    scheduler = stock_scheduler(source.family, source.grid(nfe))
    replaced = {"transformer": network.eval(), "scheduler": scheduler}
    stock: DiffusionPipeline = source.family.stock_class(**{**pipeline_arguments(pipeline), **replaced})
    return stock


def _source(shipped: Path, pipeline: FewStepPipeline) -> StockSource:
    base = Path(resolve_pretrained(shared_base(shipped)))
    teacher = type(pipeline).network_class.from_pretrained(base, subfolder="transformer", use_safetensors=True)
    networks = pipeline.transformer, teacher, StoredWeights.of_component(base / "transformer")
    scheduler = pipeline.scheduler.config
    return StockSource(type(pipeline), lambda: pipeline, *networks, scheduler.shift, scheduler.stochastic_sampling)
