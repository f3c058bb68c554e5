"""The derivative of an average velocity along the flow, by forward-mode dual numbers."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.dual import DualNumbers, pack, same_random_numbers, saved_without_tangents, unpack

AverageVelocityFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`average_velocity(x, r, t)`: (B, ...), (B,) and (B,) to (B, ...)."""

FnT = TypeVar("FnT", bound=Callable[..., object])
_outside_graphs: Callable[[FnT], FnT] = torch.compiler.disable


@_outside_graphs
def value_and_time_derivative(fn: AverageVelocityFn, x: Tensor, r: Tensor, t: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Value with its graph, and exact total time derivative without one, `du/dt = d/ds u(x + s tangent, r, t + s)` at s = 0.

    This is the Jacobian-vector product of MeanFlow (arXiv 2505.13447, Eq. 8) with the tangent (v, 0, 1) for (x, r, t), in the
    one pass of fn that the loss is backpropagated through. Under `torch.no_grad` the value has no graph either. The rules are
    those of `DualNumbers`; blocks under `torch.utils.checkpoint` (non-reentrant) run as dual numbers once, and again, for the
    backward pass, as plain ones. The numbers are carried by the tensors themselves, so module hooks run, and with them sharded
    strategies; `torch.func.jvp` would not let them. Compiled code loses the tangent, often silently: modules compiled within fn
    run eagerly here, and a function compiled around this one leaves it out of its graph.

    Args:
        fn: Average velocity; it must be differentiable in forward mode.
        x: State at t, (B, ...).
        r: End, (B,).
        t: Start, (B,), floating point; float32 also where x is of lower precision.
        tangent: Velocity of x, (B, ...).

    Returns:
        u and du/dt, (B, ...) each.

    Raises:
        RuntimeError: If fn's result carries no tangent, so that du/dt would silently be wrong.
    """
    with forward_ad.dual_level(), torch.compiler.set_stance("force_eager"):
        # a copy: operations in place write to the derivative as well
        x_dual, t_dual = pack(x, tangent.detach().clone()), pack(t, torch.ones_like(t))
        with saved_without_tangents(), DualNumbers():
            result = fn(x_dual, r, t_dual)
        u = unpack(result)
        if u.tangent is None:
            raise RuntimeError(
                "the average velocity lost its tangent, so du/dt is unknown; remove what detaches or copies its inputs"
                " (detach, numpy, an operation without a forward-mode rule)"
            )
        return u.value, u.tangent.detach()


@torch.no_grad()
def time_derivative(fn: AverageVelocityFn, x: Tensor, r: Tensor, t: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """As `value_and_time_derivative`, with neither result in a graph."""
    return value_and_time_derivative(fn, x, r, t, tangent)


@torch.no_grad()
def finite_difference(fn: AverageVelocityFn, x: Tensor, r: Tensor, t: Tensor, tangent: Tensor, step: float) -> Tensor:
    """Total time derivative of u, (B, ...), by a central difference over t - step and t + step; two passes of fn.

    Its error is that of rounding, divided by the step, and of curvature, times the step's square: for a network whose fastest
    feature of t has the angular frequency w, `difference_step(w, dtype)` balances them. r and t are taken in float32 at least,
    and x where it is of that precision.
    """
    r, t = (time.to(torch.promote_types(time.dtype, torch.float32)) for time in (r, t))
    with same_random_numbers():  # dropout drops the same in both passes
        ahead = fn(x + step * tangent.to(x.dtype), r, t + step)
    behind = fn(x - step * tangent.to(x.dtype), r, t - step)
    return (ahead - behind) / (2 * step)


def difference_step(frequency: float, dtype: torch.dtype) -> float:
    """A step of `finite_difference` that works, in units of t.

    Measured on small FLUX networks: in float32 with features up to 2 pi rad per unit of t, 5e-3 has a relative error of 4e-5,
    and up to 1000, 3e-5 has one of 3e-4; in bfloat16, 0.1 has one of 0.1 with the former, and no step works with the latter.

    Args:
        frequency: Largest angular frequency of the network's features of t, in rad per unit of t.
        dtype: That the network computes in.

    Raises:
        ConfigurationError: If no step works: at 16 bits, above 20 rad per unit of t.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return 0.03 / frequency
    if frequency > 20:
        raise ConfigurationError(
            f"differences in time are rounding errors in 16 bits with time features of {frequency:.0f} rad per unit of t; set "
            "student.time_embedding to smooth, model.derivative to exact or trainer.precision to 32-true"
        )
    return 0.6 / frequency
