r"""Network-free policies: the student predicts one policy for a full step (pi-Flow, arXiv 2510.14974, the DX policy).

A network with N outputs :math:`v_k` predicts :math:`x_0` at N times, :math:`\hat x_0^k = x_t - t \, v_k`. The times are evenly
spaced between the end r of a step and its start t. Between them, :math:`\hat x_0` is interpolated linearly. The policy's
trajectory solves

.. math:: \frac{dx_\tau}{d\tau} = \frac{x_\tau - \hat x_0(\tau)}{\tau}, \qquad
    \frac{x_\tau}{\tau} = \frac{x_t}{t} + \int_\tau^t \frac{\hat x_0(s)}{s^2} ds,

and the integral has a closed form. States and velocities along the trajectory are therefore mixtures of the outputs. The
weights depend on the times only, and sum to 1.

Every student that is exported with a policy contains a copy of this file. It imports only torch and a sibling file, and runs
without this package.
"""

import torch
from torch import Tensor, nn

from .two_time import StudentOnlyModule


def flow_step_weights(r: Tensor, t: Tensor, points: int) -> Tensor:
    """Weights (B, N) of the outputs in the average velocity of a step from t (B,) down to r (B,)."""
    return position_weights(r, r, t, points)


def position_weights(tau: Tensor, r: Tensor, t: Tensor, points: int) -> Tensor:
    r"""Weights (B, N) of the outputs in the policy's average velocity from t down to tau, for a step that ends at r.

    The state at tau is :math:`x_t - (t - \tau) \sum_k w_k v_k`.

    Args:
        tau: Times (B,) in [r, t].
        r: End of the step (B,), at least 0.
        t: Start of the step (B,), above 0.
        points: N, at least 2.
    """
    tau, r, t = (time.double() for time in (tau, r, t))
    weights = t[:, None] * _hat_weights(tau, r, t, points) / (t - tau)[:, None]
    # Limit of short steps: all times of a step are equal, but each hat function has its share of the step.
    ends = torch.full_like(weights, 1 / (points - 1))
    ends[:, [0, -1]] /= 2
    return torch.where((t - tau > 1e-6)[:, None], weights, ends).float()


def velocity_weights(tau: Tensor, r: Tensor, t: Tensor, points: int) -> Tensor:
    """Weights (B, N) of the outputs in the policy's velocity at its own state at tau.

    Args:
        tau: Times (B,) in [r, t], above 0.
        r: End of the step (B,).
        t: Start of the step (B,).
        points: N, at least 2.
    """
    tau, r, t = (time.double() for time in (tau, r, t))
    position = ((tau - r) / (t - r).clamp(min=1e-12)).clamp(0, 1) * (points - 1)
    hats = (1 - (position[:, None] - torch.arange(points, device=tau.device)).abs()).clamp(min=0)
    return ((t / tau)[:, None] * (hats - _hat_weights(tau, r, t, points))).float()


def _hat_weights(tau: Tensor, r: Tensor, t: Tensor, points: int) -> Tensor:
    r"""Weights of the :math:`\hat x_0^k` in the state at tau: :math:`\tau \int_\tau^t h_k(s) / s^2 ds`, hat functions h_k."""
    fractions = torch.arange(points, device=tau.device, dtype=tau.dtype) / (points - 1)
    knots = r[:, None] + (t - r)[:, None] * fractions
    low, high = knots[:, :-1], knots[:, 1:]
    tau = tau[:, None]
    start = torch.minimum(torch.maximum(low, tau), high)
    # The ratio is 1 where tau is inside the piece, also at tau = 0.
    ratio = torch.where(start > tau, tau / start.clamp(min=1e-30), torch.ones_like(start))
    inside = (tau < high).to(tau.dtype)
    by_square = inside * ratio * (1 - start / high.clamp(min=1e-30))
    by_first = inside * torch.special.xlogy(tau, high.clamp(min=1e-30) / start.clamp(min=1e-30))
    length = (high - low).clamp(min=1e-30)
    weights = torch.zeros_like(knots)
    weights[:, 1:] += (by_first - low * by_square) / length
    weights[:, :-1] += (high * by_square - by_first) / length
    return weights


class PolicyGrid(nn.Linear, StudentOnlyModule):
    """Layer whose N outputs are added to the network's own output to form those of a policy; zero at the start."""

    def reset_parameters(self) -> None:
        """Set all parameters to zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class PolicyHead(nn.Linear):
    """Last layer of a transformer with a policy: computes N outputs :math:`v_k = W h + b + G_k h` and mixes them.

    W and b have the names and shapes of the layer that this head replaces. While the grid G is zero, all outputs are equal, and
    so are all mixtures.

    Args:
        like: Layer to replace; its weights are not copied.
        points: N, at least 2.
    """

    def __init__(self, like: nn.Linear, points: int) -> None:
        super().__init__(like.in_features, like.out_features, bias=like.bias is not None)
        self.points = points
        self.grid = PolicyGrid(like.in_features, points * like.out_features, bias=False)
        self.mixture: Tensor | None = None

    def set_mixture(self, r: Tensor, t: Tensor, all_points: bool) -> None:
        """Set the mixture for steps from t (B,) down to r (B,): their average velocities, or all outputs one by one."""
        each = torch.eye(self.points, device=t.device).expand(len(t), -1, -1)
        self.mixture = each if all_points else flow_step_weights(r, t, self.points)[:, None]

    def forward(self, input: Tensor) -> Tensor:
        """Mix the outputs for tokens (B, L, in) by `mixture` (B, M, N) to (B M, L, out); the result is float32 if M > 1.

        `TwoTimeModel` sets `mixture`.
        """
        if self.mixture is None:
            raise RuntimeError("no times are set; call the transformer, not its last layer")
        own = super().forward(input)
        additions = self.grid(input.to(self.grid.weight.dtype)).unflatten(-1, (self.points, -1))
        with torch.autocast(input.device.type, enabled=False):
            mixed = torch.einsum("bmn,blno->bmlo", self.mixture, additions.float())
            result = (own.float()[:, None] + mixed).flatten(0, 1)
        # Separate outputs stay in float32, because callers compute their differences.
        return result.to(own.dtype) if self.mixture.shape[1] == 1 else result
