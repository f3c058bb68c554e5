"""FLUX pipelines as diffusers directories: students with the code they need, teachers in stock form."""

import copy
import json
import shutil
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from lightning_distill.models.average_velocity_scheduler import AverageVelocityScheduler
from lightning_distill.models.two_time_flux import TwoTimeFluxTransformer2DModel
from lightning_distill.models.two_time_flux_pipeline import TwoTimeFluxPipeline

CODE = {
    "_class_name": ("two_time_flux_pipeline", TwoTimeFluxPipeline, "."),
    "transformer": ("two_time_flux", TwoTimeFluxTransformer2DModel, "transformer"),
    "scheduler": ("average_velocity_scheduler", AverageVelocityScheduler, "scheduler"),
}
"""Entries of a student's model_index.json whose code travels along: file, class, folder."""
TWO_TIME_SETTINGS = ("interval_embedding", "time_frequency_bound", "interval_frequency_bound")
SHIFT_SETTINGS = ("shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


def save_two_time_pipeline(
    pipeline: FluxPipeline, student: FluxTransformer2DModel, max_sequence_length: int, directory: Path
) -> None:
    """Write a `TwoTimeFluxPipeline` that loads with `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`.

    Args:
        pipeline: The teacher's, of which everything but the transformer and the scheduler is kept.
        student: A `TwoTimeFluxTransformer2DModel`.
        max_sequence_length: T5 tokens that the student's prompts were padded to; becomes the tokenizer's own length.
        directory: Where to; made if it is not there.
    """
    tokenizer = copy.deepcopy(pipeline.tokenizer_2)
    tokenizer.model_max_length = max_sequence_length
    settings = {name: pipeline.scheduler.config[name] for name in SHIFT_SETTINGS}
    replaced = {"transformer": student, "tokenizer_2": tokenizer, "scheduler": AverageVelocityScheduler(**settings)}
    TwoTimeFluxPipeline(**{**pipeline.components, **replaced}).save_pretrained(directory)

    # diffusers knows no way to save a class with its code: it would look for this package when it loads.
    index_file = directory / "model_index.json"
    index = json.loads(index_file.read_text())
    for entry, (module, kind, folder) in CODE.items():
        index[entry] = [module, kind.__name__]
        shutil.copyfile(Path(__file__).with_name(f"{module}.py"), directory / folder / f"{module}.py")
    index_file.write_text(json.dumps(index, indent=2) + "\n")
    _forget_origin(directory)


def save_flux_pipeline(pipeline: FluxPipeline, network: FluxTransformer2DModel, directory: Path) -> None:
    """Write a stock `FluxPipeline`.

    Args:
        pipeline: Of which everything but the transformer is kept.
        network: A `TwoTimeFluxTransformer2DModel` without an interval input or smooth time.
        directory: Where to; made if it is not there.

    Raises:
        ValueError: If a stock transformer cannot compute what the network computes.
    """
    config = network.config
    if config.interval_embedding != "none" or config.time_frequency_bound is not None:
        raise ValueError("this network takes two times or smooth time, which a stock FluxPipeline cannot; save it as a student")
    with torch.device("meta"):
        stock = FluxTransformer2DModel(
            **{name: value for name, value in config.items() if not name.startswith("_") and name not in TWO_TIME_SETTINGS}
        )
    # Time embeddings in float32 beside weights in bfloat16 would fail in a stock model, which casts times.
    state = network.state_dict()
    dtype = state["x_embedder.weight"].dtype
    stock.load_state_dict({name: value.to(dtype) for name, value in state.items()}, assign=True)
    FluxPipeline(**{**pipeline.components, "transformer": stock}).save_pretrained(directory)
    _forget_origin(directory)


def _forget_origin(directory: Path) -> None:
    """Take out where the components were loaded from: a path on the machine that trained."""
    for file in directory.glob("*/*config.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
