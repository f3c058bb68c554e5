"""Guided velocities."""

import torch
from torch import Tensor

from lightning_distill.flow.path import expand


def classifier_free(v_cond: Tensor, v_null: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance, `v_null + scale (v_cond - v_null)` (arXiv 2207.12598).

    Args:
        v_cond: Velocity under the prompts, (B, ...).
        v_null: Velocity under the empty prompt, (B, ...).
        scale: A number or (B,); 1 is `v_cond` bit for bit, 0 is `v_null` up to rounding.

    Returns:
        Guided velocity, (B, ...).
    """
    # Written from v_cond, so that rows outside a guidance interval, whose scale is 1, are exactly those without guidance.
    return v_cond + _expanded(scale - 1, v_cond) * (v_cond - v_null)


def inside_interval(t: Tensor, interval: tuple[float, float]) -> Tensor:
    """Which times (B,) lie in the closed interval (low, high) where guidance applies (arXiv 2404.07724); bool, (B,)."""
    low, high = interval
    return (low <= t) & (t <= high)


def improved_mix(v_teacher: Tensor, u_cond: Tensor, u_null: Tensor, omega: Tensor | float, kappa: Tensor | float) -> Tensor:
    """MeanFlow's mix of teacher and student, `omega v_T + kappa u_c + (1 - omega - kappa) u_null`.

    Source: arXiv 2505.13447, App. B.2, with the teacher's velocity v_T in place of the conditional one, as in arXiv
    2512.13006, which takes omega 1 and kappa 0.5. It holds that

    - the weights sum to 1, so three equal velocities give that velocity;
    - `omega = 1, kappa = 0` is v_T;
    - `kappa = 0` is classifier-free guidance of v_T against u_null with scale omega;
    - `u_c = v_T` is classifier-free guidance of v_T against u_null with scale omega + kappa;
    - a student that has learned the mix, `u_c = mix`, has classifier-free guidance of v_T against u_null with the effective
      scale `omega / (1 - kappa)`; training is drawn there for |kappa| < 1.

    Args:
        v_teacher: Velocity of the teacher under the prompts, (B, ...).
        u_cond: The student's at `r = t` under the prompts, without gradient, (B, ...).
        u_null: The student's at `r = t` under the empty prompt, without gradient, (B, ...).
        omega: Weight of the teacher, a number or (B,).
        kappa: Weight of the student under the prompts, a number or (B,).

    Returns:
        Guided velocity, (B, ...).
    """
    omega, kappa = _expanded(omega, v_teacher), _expanded(kappa, v_teacher)
    return omega * v_teacher + kappa * u_cond + (1 - omega - kappa) * u_null


def _expanded(weight: Tensor | float, like: Tensor) -> Tensor | float:
    return expand(weight, like) if isinstance(weight, torch.Tensor) else weight
