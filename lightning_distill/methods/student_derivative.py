"""The derivative of a student along the flow, which the targets of continuous-time methods contain."""

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.derivative import (
    AverageVelocityFn,
    difference_step,
    finite_difference,
    value_and_time_derivative,
)
from lightning_distill.teachers.model_adapter import ModelAdapter
from lightning_distill.teachers.student_options import StudentOptions

DerivativeKind = Literal["exact", "finite_difference"]


class StudentDerivative:
    """Evaluates a student's derivative along the flow.

    Args:
        kind: "exact", by dual numbers, or "finite_difference", for a student with an operation that has no forward-mode rule,
            at the cost of two more forward passes.
        adapter: Teacher family.
        options: Options of the student, which decide the step of finite differences.

    Attributes:
        dtype: Precision of the student's matrix products, which decides that step too; set when training starts.

    Raises:
        ConfigurationError: If `kind` is another.
    """

    dtype: torch.dtype = torch.float32

    def __init__(self, kind: DerivativeKind, adapter: ModelAdapter, options: StudentOptions) -> None:
        if kind not in ("exact", "finite_difference"):
            raise ConfigurationError(f"model.derivative is {kind!r}; choose exact or finite_difference")
        self.kind = kind
        self.adapter = adapter
        self.options = options

    def value_and_derivative(
        self, fn: AverageVelocityFn, x: Tensor, r: Tensor, t: Tensor, tangent: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Value with its graph, and derivative along (tangent, 0, 1) without one, (B, C, h, w) each.

        Args:
            fn: A function of the student, of (x, r, t).
            x: State at t (B, C, h, w).
            r: End (B,).
            t: Start (B,).
            tangent: Velocity of x (B, C, h, w).
        """
        with self.adapter.frozen_routing():
            if self.kind == "exact":
                return value_and_time_derivative(fn, x, r, t, tangent)
            return fn(x, r, t), self.difference(fn, x, r, t, tangent)

    def difference(self, fn: AverageVelocityFn, x: Tensor, r: Tensor, t: Tensor, tangent: Tensor) -> Tensor:
        """The derivative by a central difference; its step suits the precision. Arguments as in `value_and_derivative`."""
        step = difference_step(self.adapter.time_frequency(self.options), self.dtype)
        return finite_difference(fn, x, r, t, tangent, step)


def compute_dtype(student: nn.Module, device: torch.device, forward_context: AbstractContextManager[Any]) -> torch.dtype:
    """Precision of the student's matrix products in training.

    Args:
        student: The network.
        device: Its device.
        forward_context: The trainer's context of a forward pass.
    """
    with forward_context:
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
    return weights_dtype(student)


def weights_dtype(network: nn.Module) -> torch.dtype:
    """The dtype of most parameters: a few are float32 whatever the precision."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in network.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])
