"""Write diffusers pipeline directories: students with the code that they need, teachers as stock pipelines."""

import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils.dynamic_modules_utils import get_relative_import_files

from lightning_distill.students.average_velocity_scheduler import AverageVelocityScheduler
from lightning_distill.students.few_step import FewStepPipeline
from lightning_distill.students.few_step_components import pipeline_arguments, student_pipeline
from lightning_distill.students.two_time import TwoTimeModel

TWO_TIME_SETTINGS = ("interval_embedding", "time_frequency_bound", "interval_frequency_bound", "rescaled_time", "policy_points")


def save_few_step_pipeline(
    pipeline: FewStepPipeline, student: TwoTimeModel, max_sequence_length: int, stochastic_sampling: bool, directory: Path
) -> None:
    """Write a few-step pipeline that loads with `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`.

    Args:
        pipeline: Pipeline of the teacher. The export has its components, except transformer and scheduler.
        student: A network of the pipeline's `network_class`.
        max_sequence_length: Number of tokens to which training padded prompts; the tokenizer's length in the export.
        stochastic_sampling: Whether each step predicts x0 and re-noises.
        directory: Output directory; created if it does not exist.
    """
    student_pipeline(type(pipeline), pipeline, student, max_sequence_length, stochastic_sampling).save_pretrained(directory)

    # diffusers cannot save a class with its code: without this, loading would import this package.
    index_file = directory / "model_index.json"
    index = json.loads(index_file.read_text())
    for entry, kind, folder in (
        ("_class_name", type(pipeline), "."),
        ("transformer", type(student), "transformer"),
        ("scheduler", AverageVelocityScheduler, "scheduler"),
    ):
        source = Path(inspect.getfile(kind))
        index[entry] = [source.stem, kind.__name__]
        for file in (source, *map(Path, get_relative_import_files(source))):
            shutil.copyfile(file, directory / folder / file.name)
    index_file.write_text(json.dumps(index, indent=2) + "\n")
    remove_local_paths(directory)


def save_stock_pipeline(pipeline: FewStepPipeline, network: TwoTimeModel, directory: Path) -> None:
    """Write a stock diffusers pipeline.

    Args:
        pipeline: Pipeline of the teacher. The export has its components, except the transformer.
        network: A network of the pipeline's `network_class`, without interval input or smooth time.
        directory: Output directory; created if it does not exist.

    Raises:
        ValueError: If a stock transformer cannot represent the network.
    """
    config = network.config
    if config.interval_embedding != "none" or config.time_frequency_bound is not None or config.rescaled_time:
        raise ValueError("a stock pipeline cannot represent a network with two times or modified time; save it as a student")
    stock = meta_stock_network(type(network), config)
    # A stock model casts times to its dtype, so float32 time embeddings would fail beside bfloat16 weights.
    state = {name: value.to(network.dtype) for name, value in network.state_dict().items()}
    stock.load_state_dict(state, assign=True)
    stock_pipeline: DiffusionPipeline = pipeline.stock_class(**{**pipeline_arguments(pipeline), "transformer": stock})
    stock_pipeline.save_pretrained(directory)
    remove_local_paths(directory)


def meta_stock_network(network_class: type[TwoTimeModel], config: Mapping[str, Any]) -> ModelMixin:
    """Stock transformer on the meta device.

    Args:
        network_class: Class of the two-time transformer.
        config: Configuration of a stock or two-time transformer.
    """
    kept = {name: value for name, value in config.items() if not name.startswith("_") and name not in TWO_TIME_SETTINGS}
    with torch.device("meta"):
        network: ModelMixin = stock_network_class(network_class)(**kept)
    return network


def stock_network_class(network_class: type[TwoTimeModel]) -> type[ModelMixin]:
    """The diffusers class that a two-time transformer extends."""
    return next(parent for parent in network_class.__mro__ if parent.__module__.startswith("diffusers.models.transformers."))


def remove_local_paths(directory: Path) -> None:
    """Remove the paths from which the components were loaded: they belong to the training machine."""
    for file in directory.glob("*/*config.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
