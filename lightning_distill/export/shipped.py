"""The shipped student as a stock pipeline of diffusers, with one small LoRA file for each number of steps."""

import shutil
from pathlib import Path

from lightning_distill.digests import write_manifest
from lightning_distill.export.lora_layers import save_lora_file
from lightning_distill.sharding.stored_weights import StoredWeights
from lightning_distill.teachers.registry import resolve_pretrained
from lightning_distill.teachers.shipped import load_shipped_student, shared_base
from lightning_distill.teachers.stock_student import StockSource, save_stock_student, time_updates
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
    pipeline = load_shipped_student(name)
    base = Path(resolve_pretrained(shared_base(shipped)))
    teacher = type(pipeline).network_class.from_pretrained(base, subfolder="transformer", use_safetensors=True)
    weights = StoredWeights.of_component(base / "transformer")
    scheduler = pipeline.scheduler.config
    networks = pipeline.transformer, teacher, weights
    source = StockSource(type(pipeline), lambda: pipeline, *networks, scheduler.shift, scheduler.stochastic_sampling)
    save_stock_student(source, max(STEPS), (), directory)
    for nfe in STEPS:
        file = save_lora_file(as_layers(time_updates(source, nfe)), directory)
        file.replace(directory / f"time_update_{nfe}.safetensors")
    for card in ("README.md", "export.json"):
        shutil.copyfile(shipped / card, directory / card)
    write_manifest(directory)
