"""Weights that are NaN or infinite, which make every image of a pipeline NaN."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_distill.teachers.pipeline_source import PipelineSource


def first_non_finite(weights: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with a NaN or infinite element, or None."""
    for name, value in weights.items():
        if value.is_floating_point() and not value.is_meta and not torch.isfinite(value).all():
            return name
    return None


def check_finite(modules: Mapping[str, nn.Module], source: PipelineSource) -> None:
    """Check the parameters of a pipeline; buffers may be infinite, as attention masks are.

    Args:
        modules: Components by name.
        source: Setting that names the pipeline, for the error message.

    Raises:
        ConfigurationError: If a parameter has a NaN or infinite element.
    """
    for component, module in modules.items():
        if name := first_non_finite(dict(module.named_parameters())):
            raise source.error(f"whose {component} has weights that are NaN or infinite, first in {name}; export it again")
