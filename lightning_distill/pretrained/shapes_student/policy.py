r"""Network-free policies: what a student says once about a whole step (pi-Flow, arXiv 2510.14974, the DX policy).

A network of N outputs :math:`v_k` says what :math:`x_0` is to be at N times, even between the end r of a step and its start t,
:math:`\hat x_0^k = x_t - t \, v_k`; between them it is interpolated, linearly. The policy's trajectory solves

.. math:: \frac{dx_\tau}{d\tau} = \frac{x_\tau - \hat x_0(\tau)}{\tau}, \qquad
    \frac{x_\tau}{\tau} = \frac{x_t}{t} + \int_\tau^t \frac{\hat x_0(s)}{s^2} ds,

and the integral is known: states and velocities along it are mixtures of the outputs, by weights of the times that sum to 1.

This file imports torch and a sibling that travels with it: it is part of exported students and must run without this package.
"""

import torch
from torch import Tensor, nn

from .two_time import OwnPart


def flow_step_weights(r: Tensor, t: Tensor, points: int) -> Tensor:
    """Weights (B, N) of the outputs in the average velocity of a step from t (B,) down to r (B,)."""
    return position_weights(r, r, t, points)


def position_weights(tau: Tensor, r: Tensor, t: Tensor, points: int) -> Tensor:
    r"""Weights (B, N) of the outputs in the average velocity from t down to tau, along the policy of a step that ends at r.

    The state there is :math:`x_t - (t - \tau) \sum_k w_k v_k`.

    Args:
        tau: Times (B,) in [r, t].
        r: End of the step (B,), at least 0.
        t: Its start (B,), above 0.
        points: N, at least 2.
    """
    tau, r, t = (time.double() for time in (tau, r, t))
    weights = t[:, None] * _pull(tau, r, t, points) / (t - tau)[:, None]
    # What shorter and shorter steps come to: all times of the step are the same, but each hat has its part of it.
    ends = torch.full_like(weights, 1 / (points - 1))
    ends[:, [0, -1]] /= 2
    return torch.where((t - tau > 1e-6)[:, None], weights, ends).float()


def velocity_weights(tau: Tensor, r: Tensor, t: Tensor, points: int) -> Tensor:
    r"""Weights (B, N) of the outputs in the policy's velocity at its own state at tau.

    Args:
        tau: Times (B,) in [r, t], above 0.
        r: End of the step (B,).
        t: Its start (B,).
        points: N, at least 2.
    """
    tau, r, t = (time.double() for time in (tau, r, t))
    place = ((tau - r) / (t - r).clamp(min=1e-12)).clamp(0, 1) * (points - 1)
    hats = (1 - (place[:, None] - torch.arange(points, device=tau.device)).abs()).clamp(min=0)
    return ((t / tau)[:, None] * (hats - _pull(tau, r, t, points))).float()


def _pull(tau: Tensor, r: Tensor, t: Tensor, points: int) -> Tensor:
    r"""How far each :math:`\hat x_0^k` has drawn the state at tau: :math:`\tau \int_\tau^t h_k(s) / s^2 ds`, h_k its hat."""
    share = torch.arange(points, device=tau.device, dtype=tau.dtype) / (points - 1)
    knots = r[:, None] + (t - r)[:, None] * share
    low, high = knots[:, :-1], knots[:, 1:]
    tau = tau[:, None]
    start = torch.minimum(torch.maximum(low, tau), high)
    # It is 1 where tau lies in the piece, at 0 too.
    ratio = torch.where(start > tau, tau / start.clamp(min=1e-30), torch.ones_like(start))
    inside = (tau < high).to(tau.dtype)
    by_square = inside * ratio * (1 - start / high.clamp(min=1e-30))
    by_first = inside * torch.special.xlogy(tau, high.clamp(min=1e-30) / start.clamp(min=1e-30))
    length = (high - low).clamp(min=1e-30)
    weights = torch.zeros_like(knots)
    weights[:, 1:] += (by_first - low * by_square) / length
    weights[:, :-1] += (high * by_square - by_first) / length
    return weights


class PolicyGrid(nn.Linear, OwnPart):
    """What a network's further outputs add to its own, zero at the start."""

    def reset_parameters(self) -> None:
        """Zeros."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class PolicyHead(nn.Linear):
    r"""Stands where a transformer has its last layer, and mixes N outputs :math:`v_k = W h + b + G_k h` as it is told.

    Its own weights are those of the layer that it replaces. As long as the grid's are zero all outputs are equal, and so is
    every mixture.

    Args:
        like: The layer; its weights are not copied.
        points: N, at least 2.
    """

    def __init__(self, like: nn.Linear, points: int) -> None:
        super().__init__(like.in_features, like.out_features, bias=like.bias is not None)
        self.points = points
        self.grid = PolicyGrid(like.in_features, points * like.out_features, bias=False)
        self.mixture: Tensor | None = None

    def mix_for(self, r: Tensor, t: Tensor, all_points: bool) -> None:
        """Be told of steps from t (B,) down to r (B,): mix to their average velocities, or give all outputs one by one."""
        each = torch.eye(self.points, device=t.device).expand(len(t), -1, -1)
        self.mixture = each if all_points else flow_step_weights(r, t, self.points)[:, None]

    def forward(self, input: Tensor) -> Tensor:
        """Mixtures (B M, L, out) of tokens (B, L, in) by `mixture` (B, M, N), that `TwoTimeModel` sets; float32 if M > 1."""
        if self.mixture is None:
            raise RuntimeError("no times are set; call the transformer, not its last layer")
        own = super().forward(input)
        further = self.grid(input.to(self.grid.weight.dtype)).unflatten(-1, (self.points, -1))
        with torch.autocast(input.device.type, enabled=False):
            mixed = torch.einsum("bmn,blno->bmlo", self.mixture, further.float())
            result = (own.float()[:, None] + mixed).flatten(0, 1)
        # Outputs one by one keep their precision: who mixes them takes differences of them.
        return result.to(own.dtype) if self.mixture.shape[1] == 1 else result
