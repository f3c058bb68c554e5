r"""Time updates: a student's embeddings of a fixed step grid, as a low-rank update of its teacher's timestep embedder.

A stock transformer computes :math:`e = W h(t) + b` from hidden vectors h of its timestep embedder. A student of two times
computes another embedding, :math:`e^*_k`, for each step k of a grid of N steps. At these N steps, h takes few values
:math:`h_g`: that of the exact time, and those of times that a pipeline in 16 bits rounds. With :math:`A h_g = \hat e_g`, unit
vectors, and columns :math:`B_g = e^*_{k(g)} - W h_g - b`, the update of the last layer

.. math:: W' = W + B A

maps every :math:`h_g` to the student's embedding. Its rank is the number of different :math:`h_g`: N for pipelines in float32.
The stored factors are those of the SVD of B A, which lose least when they are rounded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError, NonFiniteError

HALF_PRECISIONS = (torch.bfloat16, torch.float16)
TOLERANCE = 1e-4
"""Largest error of an exported embedding in float32, as a fraction of its largest entry."""

Features = Callable[[Tensor, torch.dtype], Tensor]
"""Features (N, F) that a stock pipeline feeds for timesteps (N,) in [0, 1000] if its transformer has a dtype."""


@dataclass(frozen=True)
class TimeUpdate:
    """Low-rank update B A of the last layer of a timestep embedder.

    Attributes:
        layer: Name of the layer in the stock transformer.
        A: (R, D), float32.
        B: (E, R), float32.
        residual: Largest error of the float32 embedding, as a fraction of its largest entry.
        condition_number: Condition number of the N hidden vectors in float32.
    """

    layer: str
    A: Tensor
    B: Tensor
    residual: float
    condition_number: float


@torch.no_grad()
def solve_time_update(
    layer: str, first: nn.Linear, activation: nn.Module, last: nn.Linear, features: Features, timesteps: Tensor, target: Tensor
) -> TimeUpdate:
    """Update of a stock timestep embedder that gives the embeddings of a student at N steps.

    The solution is exact for the hidden vectors of a pipeline in float32. With the remaining freedom it also fits those of
    pipelines in bfloat16 and float16, with rounded times (diffusers) and unrounded times (ComfyUI). The rounding errors of the
    hidden vectors themselves are noise, so that fit is regularised.

    Args:
        layer: Name of the last layer, for the result.
        first: First layer of the stock embedder.
        activation: Its activation.
        last: Its last layer.
        features: Features that the stock pipeline feeds.
        timesteps: Timesteps (N,) of the stock scheduler in [0, 1000], float32.
        target: Embeddings (N, E) of the student.

    Raises:
        ConfigurationError: If two steps have the same hidden vector, so that no update is exact.
        NonFiniteError: If the target is NaN or infinite.
    """
    if not target.isfinite().all():
        raise NonFiniteError("nothing was exported, because a time embedding is NaN or infinite; export an earlier checkpoint")
    fed = _fed(features, timesteps)
    hidden = [_hidden(first, activation, values, dtype) for values, dtype in fed]
    groups, count = _group([values for values, _ in fed])

    weight, bias = last.weight.double(), (0.0 if last.bias is None else last.bias.double())
    change = [target.double() - h @ weight.T - bias for h in hidden]
    steps = len(timesteps)
    columns = torch.stack([_mean_change(change, groups, group) for group in range(count)], dim=1)
    unit = torch.eye(count, dtype=torch.float64)

    exact = hidden[0]
    singular = torch.linalg.svdvals(exact)
    condition = (singular[0] / singular[-1]).item() if steps <= exact.shape[1] else float("inf")
    rows = _least_norm(exact, unit[groups[0]], torch.cat(hidden[1:]), torch.cat([unit[each] for each in groups[1:]]))

    a, b = (factor.float() for factor in _balanced(rows.T, columns))
    updated = (weight + b.double() @ a.double()).float()
    error = (exact @ updated.double().T + bias - target.double()).abs().max() / target.abs().max()
    if not error <= TOLERANCE:
        raise ConfigurationError(
            f"nfe is {steps}, but the stock timestep embedder cannot separate these steps (relative error {error:.1e}); "
            "export fewer steps, or the format any_step"
        )
    return TimeUpdate(layer, a, b, error.item(), condition)


def check_separable(features: Features, timesteps: Tensor) -> None:
    """Check that a stock pipeline feeds different features at all steps, in float32 and in 16 bits.

    Args:
        features: Features that the stock pipeline feeds.
        timesteps: Timesteps (N,) of the stock scheduler in [0, 1000], float32.

    Raises:
        ConfigurationError: If two steps have the same features.
    """
    _group([values for values, _ in _fed(features, timesteps)])


def _fed(features: Features, timesteps: Tensor) -> list[tuple[Tensor, torch.dtype]]:
    """Features (N, F) of each kind of pipeline, and the dtype of its embedder; those in float32 come first."""
    exact = features(timesteps, torch.float32)
    fed = [(exact, torch.float32)]
    for dtype in HALF_PRECISIONS:
        fed += [(exact, dtype), (features(timesteps, dtype).float(), dtype)]
    return fed


def _hidden(first: nn.Linear, activation: nn.Module, features: Tensor, dtype: torch.dtype) -> Tensor:
    """Hidden vectors (N, D), float64, as a stock embedder in `dtype` computes them."""
    bias = None if first.bias is None else first.bias.to(dtype)
    hidden: Tensor = activation(nn.functional.linear(features.to(dtype), first.weight.to(dtype), bias))
    return hidden.double()


def _group(fed: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Index of the group of each row of features, and the number of groups; equal rows have one group.

    Groups 0 to N - 1 are those of the exact times.

    Raises:
        ConfigurationError: If two steps have the same features.
    """
    step_of: dict[bytes, int] = {}
    index: dict[bytes, int] = {}
    groups = []
    for features in fed:
        rows = [row.numpy().tobytes() for row in features]
        for step, row in enumerate(rows):
            if step_of.setdefault(row, step) != step:
                raise ConfigurationError(
                    f"nfe is {len(rows)}, but steps {step_of[row] + 1} and {step + 1} have the same time in 16 bits, so that "
                    "no stock network can separate them; export fewer steps, or the format any_step"
                )
            index.setdefault(row, len(index))
        groups.append(torch.tensor([index[row] for row in rows]))
    return groups, len(index)


def _mean_change(change: Sequence[Tensor], groups: Sequence[Tensor], group: int) -> Tensor:
    """Change (E,) of the embedding in a group: exact for a time that occurs in float32, otherwise the mean of its rows."""
    exact = change[0][groups[0] == group]
    if len(exact):
        return exact[0]
    return torch.cat([rows[index == group] for rows, index in zip(change[1:], groups[1:], strict=True)]).mean(dim=0)


def _least_norm(exact: Tensor, unit: Tensor, rounded: Tensor, rounded_unit: Tensor) -> Tensor:
    """X (D, G) of least norm with exact X = unit; in the remaining directions, rounded X is close to its unit vectors."""
    x = torch.linalg.lstsq(exact, unit, driver="gelsd").solution
    basis = torch.linalg.qr(exact.T).Q
    free = rounded - rounded @ basis @ basis.T
    # Rounding noise of the hidden vectors: half a unit in the last place of bfloat16, uniformly distributed.
    noise = rounded.square().mean().sqrt() * torch.finfo(torch.bfloat16).eps / 12**0.5
    kernel = free @ free.T + noise.square() * torch.eye(len(free), dtype=torch.float64)
    return x + free.T @ torch.linalg.solve(kernel, rounded_unit - rounded @ x)


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same update B A with orthogonal rows of A and orthogonal columns of B, from its SVD.

    A pipeline in 16 bits rounds the factors of a LoRA. With hidden vectors that are nearly parallel, the least-norm A is large
    and the columns of B nearly equal, so that most of their product cancels, and its rounding errors do not.
    """
    (qa, ra), (qb, rb) = torch.linalg.qr(a.T), torch.linalg.qr(b)
    u, s, vt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return s.sqrt()[:, None] * (vt @ qa.T), (qb @ u) * s.sqrt()


def merged_weight(weight: Tensor, update: TimeUpdate) -> Tensor:
    """Weight (E, D) of the stock layer with the update, computed in float64, in float32."""
    return (weight.double() + update.B.double() @ update.A.double()).float()


def as_layers(updates: Sequence[TimeUpdate]) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors (A, B) of updates by layer, like those of a LoRA with alpha equal to its rank."""
    return {update.layer: (update.A, update.B) for update in updates}
