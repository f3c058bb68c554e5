"""Total time derivative of an average velocity along the flow, by forward-mode dual numbers."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.dual import DualNumbers, pack, preserve_rng_state, saved_without_tangents, unpack

AverageVelocityFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`average_velocity(x, r, t)` maps (B, ...), (B,) and (B,) to (B, ...)."""

FnT = TypeVar("FnT", bound=Callable[..., object])
_outside_graphs: Callable[[FnT], FnT] = torch.compiler.disable


@_outside_graphs
def value_and_time_derivative(fn: AverageVelocityFn, x: Tensor, r: Tensor, t: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Compute u with its graph, and `du/dt = d/ds u(x + s tangent, r, t + s)` at s = 0, exact and without a graph.

    This is the Jacobian-vector product of MeanFlow (arXiv 2505.13447, Eq. 8), with the tangent (v, 0, 1) for (x, r, t). It
    needs a single pass of fn, the one through which the loss is backpropagated. Under `torch.no_grad` u has no graph either.
    `DualNumbers` defines the derivative rules. Blocks under `torch.utils.checkpoint` (non-reentrant) run once with dual
    numbers. The backward pass runs them again with plain numbers.

    The tensors themselves carry the dual numbers, so module hooks run, and with them sharded strategies. `torch.func.jvp` would
    prevent both. Compiled code loses the tangent, often silently. Modules compiled within fn therefore run eagerly here, and a
    compiled caller leaves this function out of its graph.

    Args:
        fn: Average velocity; it must be differentiable in forward mode.
        x: State at t, (B, ...).
        r: End, (B,).
        t: Start, (B,), floating point; float32 also if x has a lower precision.
        tangent: Velocity of x, (B, ...).

    Returns:
        u and du/dt, (B, ...) each.

    Raises:
        RuntimeError: If fn's result has no tangent, which would make du/dt silently wrong.
    """
    with forward_ad.dual_level(), torch.compiler.set_stance("force_eager"):
        # A copy, because in-place operations also write to the tangent.
        x_dual, t_dual = pack(x, tangent.detach().clone()), pack(t, torch.ones_like(t))
        with saved_without_tangents(), DualNumbers():
            result = fn(x_dual, r, t_dual)
        u = unpack(result)
        if u.tangent is None:
            raise RuntimeError(
                "the average velocity lost its tangent, so du/dt is unknown; remove operations that detach or copy its inputs"
                " (detach, numpy, an operation without a forward-mode rule)"
            )
        return u.value, u.tangent.detach()


@torch.no_grad()
def time_derivative(fn: AverageVelocityFn, x: Tensor, r: Tensor, t: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Compute u and du/dt as `value_and_time_derivative` does, both without a graph."""
    return value_and_time_derivative(fn, x, r, t, tangent)


@torch.no_grad()
def finite_difference(fn: AverageVelocityFn, x: Tensor, r: Tensor, t: Tensor, tangent: Tensor, step: float) -> Tensor:
    """Compute du/dt, (B, ...), by a central difference over t - step and t + step, in two passes of fn.

    The error has two terms: rounding, divided by the step, and curvature, times the square of the step.
    `difference_step(w, dtype)` balances them for a network whose fastest feature of t has the angular frequency w. The times r
    and t are converted to float32 or above; x stays in its dtype.
    """
    r, t = (time.to(torch.promote_types(time.dtype, torch.float32)) for time in (r, t))
    with preserve_rng_state():  # the same dropout in both passes
        ahead = fn(x + step * tangent.to(x.dtype), r, t + step)
    behind = fn(x - step * tangent.to(x.dtype), r, t - step)
    return (ahead - behind) / (2 * step)


def difference_step(frequency: float, dtype: torch.dtype) -> float:
    """Step of `finite_difference` that balances its errors, in units of t.

    Relative errors measured on small FLUX networks, by dtype and largest frequency in rad per unit of t:

    - float32, 2 pi: 4e-5 at a step of 5e-3;
    - float32, 1000: 3e-4 at a step of 3e-5;
    - bfloat16, 2 pi: 0.1 at a step of 0.1;
    - bfloat16, 1000: no step works.

    Args:
        frequency: Largest angular frequency of the network's time features, in rad per unit of t.
        dtype: dtype of the network's computation.

    Raises:
        ConfigurationError: If dtype has 16 bits and frequency is above 20 rad per unit of t, where no step works.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return 0.03 / frequency
    if frequency > 20:
        raise ConfigurationError(
            f"finite differences in 16 bits are rounding errors for time features of {frequency:.0f} rad per unit of t; set "
            "student.time_embedding to smooth, model.derivative to exact or trainer.precision to 32-true"
        )
    return 0.6 / frequency
