"""Matching distributions by the difference of two scores (DMD2, arXiv 2405.14867; TDM, 2503.06674; f-distill, 2502.15681).

States are (B, ...), most often latents (B, C, h, w); times are (B,), float32, in [0, 1], and 1 is noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_distill.flow.path import expand, renoise

Divergence = Literal["reverse_kl", "softened_reverse_kl", "jensen_shannon", "squared_hellinger", "forward_kl", "jeffreys"]
"""Between a student's distribution and its teacher's; the weight of the last four grows with the density ratio."""
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
    """A state that was diffused on from s to a later time.

    Attributes:
        x_tau: `a x_s + b noise`, (B, ...).
        tau: (B,), between s and 1.
        noise: That was added, (B, ...).
    """

    x_tau: Tensor
    tau: Tensor
    noise: Tensor


def diffusion_std(s: Tensor, tau: Tensor) -> Tensor:
    """The b (B,) of `x_tau = a x_s + b noise`: `b^2 = tau^2 - a^2 s^2` with `a = (1 - tau) / (1 - s)`."""
    return ((tau - s) * (tau + s - 2 * tau * s)).sqrt() / (1 - s)


def diffuse(x_s: Tensor, s: Tensor, tau: Tensor) -> DiffusedState:
    """Diffuse states on to later times.

    Args:
        x_s: (B, ...).
        s: Their times (B,), below 1.
        tau: (B,), between s and 1.
    """
    noise = torch.randn_like(x_s)
    return DiffusedState(renoise(x_s, s, tau, noise), tau, noise)


def matching_gradient(x_s: Tensor, x0_critic: Tensor, x0_teacher: Tensor) -> Tensor:
    r"""Gradient at x_s of the divergence between its distribution and the teacher's (DMD2, arXiv 2405.14867).

    .. math:: g = \frac{\hat x_0^F(x_\tau) - \hat x_0^T(x_\tau)}{\mathrm{mean} \, |x_s - \hat x_0^T|}

    Args:
        x_s: (B, ...).
        x0_critic: What the critic, who knows the distribution of x_s, makes of the diffused x_tau, (B, ...).
        x0_teacher: What the teacher makes of it, (B, ...).

    Returns:
        g, (B, ...). A step against it moves x_s to where the teacher sees data.
    """
    size = (x_s - x0_teacher).abs().flatten(1).mean(1).clamp_min(1e-3)
    return (x0_critic - x0_teacher) / expand(size, x_s)


def matching_loss(x_s: Tensor, gradient: Tensor) -> Tensor:
    r"""The loss :math:`\frac12 \| x_s - \mathrm{sg}(x_s - g) \|^2` (B,), a mean over entries; its gradient at x_s is g."""
    return 0.5 * (x_s - (x_s - gradient).detach()).square().flatten(1).mean(1)


def critic_loss(v: Tensor, x_s: Tensor, s: Tensor, diffused: DiffusedState) -> Tensor:
    r"""Flow matching of a critic on the states of a student.

    The velocity at :math:`x_\tau` with the conditional score :math:`-(x_\tau - a x_s) / b^2` is
    :math:`(\tau \, \text{noise}' / b - x_\tau) / (1 - \tau)`. The square is weighted by
    :math:`(1 - s)^2 b^2 / \tau^2`, which is 1 at s = 0, where this is plain flow matching. It keeps the target finite where tau
    is close to s, and the loss of one size for all s: the noise within :math:`x_s` is worth :math:`s / (1 - s)` in the target.

    Args:
        v: The critic's velocity at x_tau, (B, ...).
        x_s: States, without gradient, (B, ...).
        s: Their times, (B,).
        diffused: What `diffuse` made of them.

    Returns:
        Loss, (B,).
    """
    x_tau, tau = diffused.x_tau, diffused.tau
    b = diffusion_std(s, tau)
    target = (expand(tau / b, x_s) * diffused.noise - x_tau) / expand(1 - tau, x_s)
    return ((1 - s) * b / tau).square() * (v - target).square().flatten(1).mean(1)


def divergence_weight(ratio: Tensor, divergence: Divergence) -> Tensor:
    r"""What the difference of scores is weighted by where a divergence is to fall (f-distill, arXiv 2502.15681).

    With :math:`r = p / q`, the density of the teacher's distribution over the student's, the gradient of
    :math:`D_f = E_q f(r)` in a parameter of the samples x of q is

    .. math:: \nabla D_f = -E_q [h(r) \, (\nabla_x \log p - \nabla_x \log q) \, \nabla x], \quad h(r) = f''(r) \, r^2.

    Args:
        ratio: r of each sample, above 0, (B,).
        divergence: Its name. The reverse Kullback-Leibler divergence has h = 1.

    Returns:
        h, (B,).
    """
    return _WEIGHTS[divergence](ratio)
