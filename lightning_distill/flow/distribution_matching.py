"""Distribution matching by the difference of two scores (DMD2, arXiv 2405.14867; TDM, 2503.06674; f-distill, 2502.15681).

States are (B, ...), usually latents (B, C, h, w). Times are (B,), float32, in [0, 1]; 1 is noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_distill.flow.path import expand, renoise

Divergence = Literal["reverse_kl", "softened_reverse_kl", "jensen_shannon", "squared_hellinger", "forward_kl", "jeffreys"]
"""Divergence between the distributions of student and teacher. The last four weights grow with the density ratio."""
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)

_WEIGHTS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "jensen_shannon": lambda r: r / (1 + r),
    "squared_hellinger": lambda r: r.sqrt() / 4,
    "forward_kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
}


@dataclass(frozen=True)
class DiffusedState:
    """A state that was diffused from time s to a later time tau.

    Attributes:
        x_tau: `a x_s + b noise`, (B, ...).
        tau: Later time, (B,), between s and 1.
        noise: Added noise, (B, ...).
    """

    x_tau: Tensor
    tau: Tensor
    noise: Tensor


def diffusion_std(s: Tensor, tau: Tensor) -> Tensor:
    """Standard deviation b (B,) in `x_tau = a x_s + b noise`: `b^2 = tau^2 - a^2 s^2` with `a = (1 - tau) / (1 - s)`."""
    return ((tau - s) * (tau + s - 2 * tau * s)).sqrt() / (1 - s)


def diffuse(x_s: Tensor, s: Tensor, tau: Tensor) -> DiffusedState:
    """Diffuse states to later times.

    Args:
        x_s: States, (B, ...).
        s: Times of the states, (B,), below 1.
        tau: Later times, (B,), between s and 1.
    """
    noise = torch.randn_like(x_s)
    return DiffusedState(renoise(x_s, s, tau, noise), tau, noise)


def matching_gradient(x_s: Tensor, x0_critic: Tensor, x0_teacher: Tensor) -> Tensor:
    r"""Gradient with respect to x_s of the divergence between its distribution and the teacher's (DMD2, arXiv 2405.14867).

    .. math:: g = \frac{\hat x_0^F(x_\tau) - \hat x_0^T(x_\tau)}{\mathrm{mean} \, |x_s - \hat x_0^T|}

    Args:
        x_s: States, (B, ...).
        x0_critic: x0 that the critic predicts from the diffused x_tau, (B, ...). The critic knows the distribution of x_s.
        x0_teacher: x0 that the teacher predicts from x_tau, (B, ...).

    Returns:
        g, (B, ...). A step against g moves x_s to where the teacher predicts data.
    """
    size = (x_s - x0_teacher).abs().flatten(1).mean(1).clamp_min(1e-3)
    return (x0_critic - x0_teacher) / expand(size, x_s)


def matching_loss(x_s: Tensor, gradient: Tensor) -> Tensor:
    r"""Loss :math:`\frac12 \| x_s - \mathrm{sg}(x_s - g) \|^2` (B,), a mean over entries with gradient g at x_s."""
    return 0.5 * (x_s - (x_s - gradient).detach()).square().flatten(1).mean(1)


def critic_loss(v: Tensor, x_s: Tensor, s: Tensor, diffused: DiffusedState) -> Tensor:
    r"""Flow-matching loss of a critic on the states of a student.

    The velocity at :math:`x_\tau` with the conditional score :math:`-(x_\tau - a x_s) / b^2` is
    :math:`(\tau \, \text{noise}' / b - x_\tau) / (1 - \tau)`. The squared error has the weight :math:`(1 - s)^2 b^2 / \tau^2`.
    At s = 0 this weight is 1, and the loss is plain flow matching.

    With this weight the loss stays finite where tau is close to s. The loss also has the same size for all s, although the
    noise in :math:`x_s` contributes :math:`s / (1 - s)` to the target.

    Args:
        v: Velocity of the critic at x_tau, (B, ...).
        x_s: States, without gradient, (B, ...).
        s: Times of the states, (B,).
        diffused: Result of `diffuse` for these states.

    Returns:
        Loss, (B,).
    """
    x_tau, tau = diffused.x_tau, diffused.tau
    b = diffusion_std(s, tau)
    target = (expand(tau / b, x_s) * diffused.noise - x_tau) / expand(1 - tau, x_s)
    return ((1 - s) * b / tau).square() * (v - target).square().flatten(1).mean(1)


def divergence_weight(ratio: Tensor, divergence: Divergence) -> Tensor:
    r"""Weight of the difference of scores that minimizes a given divergence (f-distill, arXiv 2502.15681).

    Let :math:`r = p / q` be the density of the teacher's distribution over the student's. The gradient of
    :math:`D_f = E_q f(r)` in a parameter of the samples x of q is

    .. math:: \nabla D_f = -E_q [h(r) \, (\nabla_x \log p - \nabla_x \log q) \, \nabla x], \quad h(r) = f''(r) \, r^2.

    Args:
        ratio: r of each sample, above 0, (B,).
        divergence: Name of the divergence. The reverse Kullback-Leibler divergence has h = 1.

    Returns:
        h, (B,).
    """
    return _WEIGHTS[divergence](ratio)
