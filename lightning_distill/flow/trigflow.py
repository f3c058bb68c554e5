r"""TrigFlow, the path of continuous-time consistency models, and its equivalence with the linear path.

States are :math:`y_s = \cos(s) \, x_0 + \sin(s) \, \text{noise}` with s in [0, pi/2] (sCM, arXiv 2410.11081, section 3.1; the
noise has standard deviation 1, as on the linear path). They are states of the linear path at another time, scaled. A
flow-matching network is therefore a TrigFlow network without training (SANA-Sprint, arXiv 2503.09641; arXiv 2512.13006). Times
are (B,), states and velocities (B, ...).
"""

import torch
from torch import Tensor

from lightning_distill.flow.path import expand


def trig_time(t: Tensor) -> Tensor:
    """TrigFlow time s in [0, pi/2] of a linear time t in [0, 1]: `tan s = t / (1 - t)`."""
    return torch.atan2(t, 1 - t)


def linear_time(s: Tensor) -> Tensor:
    """Linear time `t = sin s / (sin s + cos s)` in [0, 1] of s in [0, pi/2]: the inverse of `trig_time`."""
    return torch.sin(s) / (torch.sin(s) + torch.cos(s))


def trig_state(x_t: Tensor, s: Tensor) -> Tensor:
    """TrigFlow state y_s of a linear state, `(cos s + sin s) x_t`."""
    return expand(torch.cos(s) + torch.sin(s), x_t) * x_t


def linear_state(y_s: Tensor, s: Tensor) -> Tensor:
    """Linear state x_t of a TrigFlow state, `y_s / (cos s + sin s)`: the inverse of `trig_state`."""
    return y_s / expand(torch.cos(s) + torch.sin(s), y_s)


def trig_velocity(v: Tensor, x_t: Tensor, s: Tensor) -> Tensor:
    """TrigFlow output F of a linear velocity, `(cos s - sin s) x_t + v / (cos s + sin s)`.

    For the velocity field, F is dy/ds. v may also be an average velocity u down to 0. Then `cos(s) y_s - sin(s) F` is
    `x_t - t u`, the same prediction of x0.
    """
    sin, cos = expand(torch.sin(s), x_t), expand(torch.cos(s), x_t)
    return (cos - sin) * x_t + v / (cos + sin)


def linear_velocity(f: Tensor, x_t: Tensor, s: Tensor) -> Tensor:
    """Linear velocity of an F, `(cos s + sin s) F - (cos^2 s - sin^2 s) x_t`: the inverse of `trig_velocity`."""
    sin, cos = expand(torch.sin(s), x_t), expand(torch.cos(s), x_t)
    return (cos + sin) * f - (cos**2 - sin**2) * x_t


def consistency_tangent(f: Tensor, velocity: Tensor, y_s: Tensor, dfds: Tensor, s: Tensor, weight: float = 1.0) -> Tensor:
    r"""Derivative of a consistency model along the trajectory, times cos s (sCM, arXiv 2410.11081, Eq. 6 and Algorithm 1).

    .. math:: g = \cos s \, \frac{d}{ds} [\cos(s) y_s - \sin(s) F]
        = -\cos^2(s) (F - \dot y_s) - \rho \cos(s) \sin(s) \, (y_s + \dot F)

    It is 0 for a model that predicts the same x0 along the trajectory.

    Args:
        f: F of the student (B, ...).
        velocity: dy/ds, F of the teacher (B, ...).
        y_s: State (B, ...).
        dfds: Total derivative of f along the trajectory (B, ...).
        s: Times (B,).
        weight: Warm-up weight rho of the second term, which is unstable at the start, in [0, 1].
    """
    sin, cos = expand(torch.sin(s), y_s), expand(torch.cos(s), y_s)
    return -(cos**2) * (f - velocity) - weight * cos * sin * (y_s + dfds)
