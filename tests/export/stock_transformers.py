"""Stock transformers of tiny pipelines: a recorded call, random LoRA factors, and merged weights."""

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from lightning_distill.export.lora_layers import LoraLayers
from tests.teachers.tiny_families import FAMILIES

Evaluate = Callable[[nn.Module], Tensor]
"""Evaluates a transformer on recorded inputs."""

EXPECTED = ("No LoRA keys associated to CLIPTextModel", "There are modules in")
"""Starts of warnings about LoRA files without text encoders, and about modules that `from_single_file` casts."""


def tiny_stock(family: str) -> tuple[DiffusionPipeline, Evaluate]:
    """A tiny pipeline and its transformer's first call in sampling."""
    torch.manual_seed(0)
    pipeline = FAMILIES[family]()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.requires_grad_(False)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, args, options: calls.append((args, options)), with_kwargs=True
    )
    size = {"height": 32, "width": 32} | ({"use_resolution_binning": False} if family == "sana" else {})
    pipeline(prompt="a red circle", num_inference_steps=1, output_type="latent", **size)
    hook.remove()
    args, options = calls[0]

    def evaluate(transformer: nn.Module) -> Tensor:
        with torch.no_grad():
            output = transformer(*args, **options)[0]
        return output if isinstance(output, Tensor) else torch.stack(list(output))

    return pipeline, evaluate


def random_layers(shapes: dict[str, tuple[int, int]], scale: float = 0.05) -> LoraLayers:
    """Factors for layers of shapes (out, in), with ranks of 1 to 3."""
    ranks = {name: 1 + index % 3 for index, name in enumerate(shapes)}
    return {
        name: (torch.randn(ranks[name], columns), scale * torch.randn(rows, ranks[name]))
        for name, (rows, columns) in shapes.items()
    }


def linear_shapes(transformer: nn.Module, names: Iterable[str] | None = None) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of all linear layers, or of some."""
    shapes = {
        name: (part.out_features, part.in_features) for name, part in transformer.named_modules() if isinstance(part, nn.Linear)
    }
    return shapes if names is None else {name: shapes[name] for name in names}


def merged(transformer: nn.Module, *loras: LoraLayers) -> nn.Module:
    """A copy with the updates B A added to the weights."""
    result = copy.deepcopy(transformer)
    for layers in loras:
        for name, (a, b) in layers.items():
            result.get_submodule(name).weight.data += b @ a
    return result


@contextmanager
def without_warnings() -> Iterator[None]:
    """Fail on warnings of diffusers and peft, such as those about unknown or missing keys."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            yield
    finally:
        logger.removeHandler(handler)
    if unexpected := [each for each in messages if not each.startswith(EXPECTED)]:
        pytest.fail(unexpected[0])
