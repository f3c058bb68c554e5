"""The derivative of an average velocity along the flow, by forward-mode dual numbers."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

AverageVelocityFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`average_velocity(x, r, t)`: (B, ...), (B,) and (B,) to (B, ...)."""

FnT = TypeVar("FnT", bound=Callable[..., object])

# torch leaves these without types
_make_dual: Callable[[Tensor, Tensor], Tensor] = forward_ad.make_dual
_unpack_dual: Callable[[Tensor], tuple[Tensor, Tensor | None]] = forward_ad.unpack_dual

_outside_graphs: Callable[[FnT], FnT] = torch.compiler.disable


@_outside_graphs
@torch.no_grad()
def time_derivative(fn: AverageVelocityFn, x: Tensor, r: Tensor, t: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Value and total time derivative, `du/dt = d/ds u(x + s tangent, r, t + s)` at s = 0, exact and without gradient.

    This is the Jacobian-vector product of MeanFlow (arXiv 2505.13447, Eq. 8) with the tangent (v, 0, 1) for (x, r, t), in one
    pass of fn. Dual numbers are carried by the tensors themselves, so module hooks run, and with them sharded strategies;
    `torch.func.jvp` would not let them. Fused attention has no forward-mode rule, so attention takes the math backend.
    Compiled code loses the tangent, often silently: modules compiled within fn run eagerly here, and a function compiled
    around this one leaves it out of its graph.

    Args:
        fn: Average velocity; it must be differentiable in forward mode.
        x: State at t, (B, ...).
        r: End, (B,).
        t: Start, (B,), floating point; float32 also where x is of lower precision.
        tangent: Velocity of x, (B, ...).

    Returns:
        u and du/dt, (B, ...) each, without gradient.

    Raises:
        RuntimeError: If fn's result carries no tangent, so that du/dt would silently be wrong.
    """
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        x_dual = _make_dual(x, tangent.to(x.dtype))
        t_dual = _make_dual(t, torch.ones_like(t))
        u, dudt = _unpack_dual(fn(x_dual, r, t_dual))
    if dudt is None:
        raise RuntimeError(
            "the average velocity lost its tangent, so du/dt is unknown; remove what detaches or copies its inputs"
            " (detach, numpy, an operation without a forward-mode rule)"
        )
    return u, dudt
