r"""TrigFlow, the path of continuous-time consistency models, and its equivalence with the linear path.

The states are :math:`y_s = \cos(s) \, x_0 + \sin(s) \, \text{noise}` with s in [0, pi/2] (sCM, arXiv 2410.11081, section 3.1;
the noise's standard deviation is 1, as the linear path's). They are the linear path's states, scaled, at another time, so a
flow-matching network is a TrigFlow network without training (SANA-Sprint, arXiv 2503.09641; arXiv 2512.13006). Times are (B,),
states and velocities (B, ...).
"""

import torch
from torch import Tensor

from lightning_distill.flow.path import expand


def trig_time(t: Tensor) -> Tensor:
    """The s in [0, pi/2] of a linear time t in [0, 1]: `tan s = t / (1 - t)`."""
    return torch.atan2(t, 1 - t)


def linear_time(s: Tensor) -> Tensor:
    """The t in [0, 1] of an s in [0, pi/2], `sin s / (sin s + cos s)`: the inverse of `trig_time`."""
    return torch.sin(s) / (torch.sin(s) + torch.cos(s))


def trig_state(x_t: Tensor, s: Tensor) -> Tensor:
    """The y_s of a linear state, `(cos s + sin s) x_t`."""
    return expand(torch.cos(s) + torch.sin(s), x_t) * x_t


def linear_state(y_s: Tensor, s: Tensor) -> Tensor:
    """The x_t of a TrigFlow state, `y_s / (cos s + sin s)`: the inverse of `trig_state`."""
    return y_s / expand(torch.cos(s) + torch.sin(s), y_s)


def trig_velocity(v: Tensor, x_t: Tensor, s: Tensor) -> Tensor:
    """F of a linear velocity, `(cos s - sin s) x_t + v / (cos s + sin s)`.

    For the velocity field F is dy/ds. For an average velocity u down to 0 in the place of v, `cos(s) y_s - sin(s) F` is
    `x_t - t u`: the same prediction of x0.
    """
    sin, cos = expand(torch.sin(s), x_t), expand(torch.cos(s), x_t)
    return (cos - sin) * x_t + v / (cos + sin)


def linear_velocity(f: Tensor, x_t: Tensor, s: Tensor) -> Tensor:
    """Linear velocity of an F, `(cos s + sin s) F - (cos^2 s - sin^2 s) x_t`: the inverse of `trig_velocity`."""
    sin, cos = expand(torch.sin(s), x_t), expand(torch.cos(s), x_t)
    return (cos + sin) * f - (cos**2 - sin**2) * x_t


def consistency_tangent(f: Tensor, velocity: Tensor, y_s: Tensor, dfds: Tensor, s: Tensor, weight: float = 1.0) -> Tensor:
    r"""How a consistency model changes along the trajectory, times cos s (sCM, arXiv 2410.11081, Eq. 6 and Algorithm 1).

    .. math:: g = \cos s \, \frac{d}{ds} [\cos(s) y_s - \sin(s) F]
        = -\cos^2(s) (F - \dot y_s) - \rho \cos(s) \sin(s) \, (y_s + \dot F)

    It vanishes for a model that predicts one x0 all along.

    Args:
        f: F of the student (B, ...).
        velocity: dy/ds, F of the teacher (B, ...).
        y_s: State (B, ...).
        dfds: Total derivative of f along the trajectory (B, ...).
        s: Times (B,).
        weight: rho of the warm-up of the part that is unstable at the start, in [0, 1].
    """
    sin, cos = expand(torch.sin(s), y_s), expand(torch.cos(s), y_s)
    return -(cos**2) * (f - velocity) - weight * cos * sin * (y_s + dfds)
