"""Guided velocities."""

import torch
from torch import Tensor

from lightning_distill.flow.path import expand


def classifier_free(v_cond: Tensor, v_null: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance, `v_null + scale (v_cond - v_null)` (arXiv 2207.12598).

    Args:
        v_cond: Velocity under the prompts, (B, ...).
        v_null: Velocity under the empty prompt, (B, ...).
        scale: Scalar or (B,); 1 returns `v_cond` bit for bit, 0 returns `v_null` up to rounding.

    Returns:
        Guided velocity, (B, ...).
    """
    # Written from v_cond, so that rows with scale 1, those outside a guidance interval, equal v_cond exactly.
    return v_cond + _broadcast(scale - 1, v_cond) * (v_cond - v_null)


def inside_interval(t: Tensor, interval: tuple[float, float]) -> Tensor:
    """Mask (B,) of the times inside the closed guidance interval (low, high) (arXiv 2404.07724)."""
    low, high = interval
    return (low <= t) & (t <= high)


def improved_mix(v_teacher: Tensor, u_cond: Tensor, u_null: Tensor, omega: Tensor | float, kappa: Tensor | float) -> Tensor:
    """MeanFlow's mix of teacher and student, `omega v_T + kappa u_c + (1 - omega - kappa) u_null`.

    Source: arXiv 2505.13447, App. B.2, with the teacher's velocity v_T in place of the conditional velocity. arXiv 2512.13006
    makes the same replacement, with omega 1 and kappa 0.5. Properties:

    - the weights sum to 1, so three equal velocities give that velocity;
    - `omega = 1, kappa = 0` is v_T;
    - `kappa = 0` is classifier-free guidance of v_T against u_null with scale omega;
    - `u_c = v_T` is classifier-free guidance of v_T against u_null with scale omega + kappa;
    - training converges to `u_c = mix` for |kappa| < 1. This mix is classifier-free guidance of v_T against u_null with the
      effective scale `omega / (1 - kappa)`.

    Args:
        v_teacher: Velocity of the teacher under the prompts, (B, ...).
        u_cond: Velocity of the student at `r = t` under the prompts, without gradient, (B, ...).
        u_null: Velocity of the student at `r = t` under the empty prompt, without gradient, (B, ...).
        omega: Weight of the teacher, scalar or (B,).
        kappa: Weight of the student under the prompts, scalar or (B,).

    Returns:
        Guided velocity, (B, ...).
    """
    omega, kappa = _broadcast(omega, v_teacher), _broadcast(kappa, v_teacher)
    return omega * v_teacher + kappa * u_cond + (1 - omega - kappa) * u_null


def _broadcast(weight: Tensor | float, like: Tensor) -> Tensor | float:
    return expand(weight, like) if isinstance(weight, torch.Tensor) else weight
