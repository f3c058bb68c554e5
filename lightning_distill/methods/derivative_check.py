"""A check of the student's derivative before a run relies on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.attention_kernel import unsupported_reason
from lightning_distill.flow.derivative import (
    AverageVelocityFn,
    difference_step,
    finite_difference,
    value_and_time_derivative,
)
from lightning_distill.methods.networks import Networks, StudentDerivative

SAMPLES = 2
TOLERANCE = {torch.float32: 0.05, torch.float16: 0.2, torch.bfloat16: 0.2}
"""Largest relative difference from differences in float32 that is taken for rounding, by the precision of the run.

To it comes what the differences themselves resolve. In 24 steps of a small FLUX student at high learning rates, an exact
derivative differed from them by up to 0.15, and never by more than their resolution.
"""


@dataclass(frozen=True)
class DerivativeReport:
    """How the derivative is taken.

    Attributes:
        kind: "exact" or "finite_difference".
        precision: Dtype that the student computes in.
        attention: Calls of torch's attention in one pass.
        fused: Whether fused attention was allowed in all of them.
        blocks: Why the derivative goes through attention in blocks and not by a kernel; None where it goes by the kernel.
        difference: Relative difference of the derivative from differences in float32, or None where weights are not float32.
        resolution: Relative change of these differences when their step is halved, which bounds their error.
        compiled: Names of compiled modules, which run eagerly within the derivative.
        sharded: Whether weights are sharded.
    """

    kind: str
    precision: torch.dtype
    attention: int
    fused: bool
    blocks: str | None
    difference: float | None
    resolution: float | None
    compiled: tuple[str, ...]
    sharded: bool

    def __str__(self) -> str:
        """One sentence for the log."""
        kind = "exact" if self.kind == "exact" else "by finite differences"
        parts = [f"Derivative: {kind}, in {str(self.precision).removeprefix('torch.')}"]
        if self.kind == "exact":
            way = "by jvp_flash_attention" if self.blocks is None else f"in blocks ({self.blocks})"
            parts.append(
                f"{self.attention} calls of attention, {'fused' if self.fused else 'not fused'}, derived {way}"
                if self.attention
                else "no attention seen"
            )
        if self.difference is None:
            parts.append("not compared with differences in float32, since the weights are not in it")
        else:
            parts.append(f"{self.difference:.1e} from differences in float32, which resolve {self.resolution:.1e}")
        if self.compiled:
            parts.append(f"{len(self.compiled)} compiled modules run eagerly within it ({self.compiled[0]})")
        if self.sharded:
            parts.append("weights are sharded")
        return ", ".join(parts)


def check_derivative(
    derivative: StudentDerivative,
    networks: Networks,
    latent_shape: tuple[int, ...],
    device: torch.device,
    forward_context: Callable[[], AbstractContextManager[Any]],
    resumes: bool = False,
) -> DerivativeReport:
    """Evaluate the derivative of the student on a probe batch, as in training, and compare it with float32 differences.

    Where the student's velocities change fast, differences are inaccurate as well. A second step tells how much.

    Args:
        derivative: How the derivative is evaluated; its `dtype` is set.
        networks: Teacher and student.
        latent_shape: Shape (C, h, w) of the latents.
        device: Device of the networks.
        forward_context: The trainer's context of a forward pass.
        resumes: Whether the run resumes from a checkpoint, whose run has passed this check. A difference is then a warning.

    Raises:
        ConfigurationError: If the student has no derivative, or differences give another one.
    """
    student = networks.student
    derivative.dtype = dtype = compute_dtype(student, device, forward_context())
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        training = student.training
        student.eval()  # dropout would differ between passes
        try:
            with networks.adapter.frozen_routing():
                found, differences, seen = _measure(derivative, networks, latent_shape, device, forward_context)
        finally:
            student.train(training)
    difference = resolution = None
    if differences is not None:
        coarse, fine = differences
        difference, resolution = _relative(found.float(), fine), _relative(coarse, fine)
    report = DerivativeReport(
        kind=derivative.kind,
        precision=dtype,
        attention=seen.count,
        fused=seen.fused,
        blocks=seen.blocks,
        difference=difference,
        resolution=resolution,
        compiled=tuple(name for name, part in student.named_modules() if isinstance(part, torch._dynamo.OptimizedModule)),
        sharded=any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in student.parameters()),
    )
    if difference is not None and not difference <= TOLERANCE.get(dtype, 0.05) + (resolution or 0.0):
        remedy = "to finite_difference, if an operation has a wrong derivative" if derivative.kind == "exact" else "to exact"
        message = (
            f"the student's derivative differs from float32 differences by {difference:.2g} of its size, and they resolve "
            f"{resolution:.2g}; set trainer.precision to 32-true if that is rounding, or model.derivative {remedy}"
        )
        if not resumes:
            raise ConfigurationError(message)
        rank_zero_warn(message)
    return report


def report_derivative(report: DerivativeReport, loggers: Iterable[Any]) -> None:
    """Log how the derivative is evaluated."""
    rank_zero_info(str(report))
    if report.difference is not None:
        for logger in loggers:
            logger.log_metrics({"derivative/difference": report.difference}, step=0)


def _relative(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm().clamp_min(1e-6)).item()


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


@torch.no_grad()
def _measure(
    derivative: StudentDerivative,
    networks: Networks,
    latent_shape: tuple[int, ...],
    device: torch.device,
    forward_context: Callable[[], AbstractContextManager[Any]],
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, _AttentionCalls]:
    """The derivative, its differences with two steps, the second half of the first, and what attention was called."""
    adapter, student = networks.adapter, networks.student
    x = torch.randn(SAMPLES, *latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
    t = torch.tensor([0.4, 0.8], device=device)
    r = 0.4 * t
    null, scale = networks.null_condition(SAMPLES), torch.full((SAMPLES,), networks.guidance.scale, device=device)

    def average_velocity(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return adapter.average_velocity(student, x, r, t, null, scale)

    with forward_context():
        v = adapter.velocity(networks.teacher, x, t, null, scale)
        with _AttentionCalls() as seen:
            found = _evaluate(derivative, average_velocity, x, r, t, v)
    if weights_dtype(student) not in (torch.float32, torch.float64):
        return found, None, seen
    step = difference_step(adapter.time_frequency(derivative.options), torch.float32)
    with torch.autocast(device.type, enabled=False):
        coarse, fine = (finite_difference(average_velocity, x, r, t, v, h).float() for h in (step, step / 2))
        return found, (coarse, fine), seen


def _evaluate(derivative: StudentDerivative, fn: AverageVelocityFn, x: Tensor, r: Tensor, t: Tensor, v: Tensor) -> Tensor:
    if derivative.kind == "finite_difference":
        return derivative.difference(fn, x, r, t, v)
    try:
        return value_and_time_derivative(fn, x, r, t, v)[1]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ConfigurationError(
            f"the student has no exact derivative ({error}); set adapter.attention_backend to native for attention, or "
            "model.derivative to finite_difference"
        ) from error


class _AttentionCalls(TorchFunctionMode):
    """Counts calls of torch's attention, and sees whether fused kernels are allowed, and which way their derivative goes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.fused = True
        self.blocks: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.count += 1
            self.fused &= torch.backends.cuda.flash_sdp_enabled()  # of the CPU's kernel as well
            self.blocks = self.blocks or _refusal(result, *args, **(kwargs or {}))
        return result


def _refusal(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> str | None:
    return unsupported_reason(query, key, value, attn_mask, is_causal, out.dtype)
