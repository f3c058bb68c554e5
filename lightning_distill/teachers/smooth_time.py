r"""Smooth time: refit the timestep embedder of a student on features of bounded frequency.

The derivative of a network along t passes through its timestep embedding. The input of FLUX's embedding is sinusoids of
1000 t. Their derivative is up to 1000 times as large as the features, and the differential solution of MeanFlow diverges.

The embedding is a function of one scalar, so it can be refitted separately and in closed form. The refitted embedder has
the same shape, and the frequencies of its features are below a bound. Teacher and student then agree up to the fit error,
and the derivative is small.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_distill.students.two_time import Float32TimestepEmbedding, TwoTimeEmbedding

GRID = 4001
"""Number of grid times in [0, 1] for the fit."""


@dataclass(frozen=True)
class SmoothTimeReport:
    """Comparison of a refitted embedder e' with the original e, over t in [0, 1].

    Attributes:
        fit_error: `||e' - e|| / ||e - mean e||`, on the grid.
        derivative_before: Largest `|de/dt|` on the grid.
        derivative_after: Largest `|de'/dt|` on the grid.
    """

    fit_error: float
    derivative_before: float
    derivative_after: float


def largest_derivative(embedder: Callable[[Tensor], Tensor], times: Tensor) -> float:
    """Largest `|de/dt|` over `times` (N,), from central differences of one tenth of the fastest oscillation of FLUX."""
    step = 1e-4
    with torch.no_grad():
        difference = embedder(times + step) - embedder(times - step)
    return (difference.norm(dim=-1) / (2 * step)).max().item()


@torch.no_grad()
def refit_embedder(
    original: Callable[[Tensor], Tensor],
    features: Callable[[Tensor], Tensor],
    embedder: Float32TimestepEmbedding,
    derivative_penalty: float,
    ridge: float = 1e-6,
) -> SmoothTimeReport:
    r"""Fit `embedder` so that `embedder(features(t))` approximates `original(t)` on [0, 1] and is smooth.

    The first layer is random. The fit is thus a linear least-squares problem in the last layer,

    .. math:: \min_W \sum_t \| W h(t) - e(t) \|^2 + \mu \| W h'(t) \|^2 + \rho \| W \|^2,
        \quad h(t) = (\mathrm{silu}(W_1 \phi(t) + b_1), 1),

    solved in float64 and in closed form.

    Args:
        original: Maps times (N,) in [0, 1] to embeddings (N, D).
        features: Maps times (N,) to features (N, F) of bounded frequency.
        embedder: The embedder to fit, changed in place.
        derivative_penalty: The weight mu of the squared derivative along t.
        ridge: The regularisation rho, relative to the mean squared norm of the hidden features.

    Returns:
        The fit error, and the derivatives before and after.
    """
    first, activation, last = embedder.layers
    _randomize_hidden_layer(first)
    times = torch.linspace(0, 1, GRID, device=first.weight.device)
    target = original(times).double()

    def design(t: Tensor) -> Tensor:
        hidden = activation(first(features(t))).double()
        return torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1)

    step = 1e-3
    slope = (design(times + step) - design(times - step)) / (2 * step)
    matrix = design(times)
    gram = matrix.T @ matrix
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    solution = torch.linalg.solve(gram + derivative_penalty * slope.T @ slope + penalty, matrix.T @ target)
    last.weight.copy_(solution[:-1].T)
    last.bias.copy_(solution[-1])

    def refitted(t: Tensor) -> Tensor:
        return embedder.embed(features(t))

    error = (refitted(times).double() - target).norm() / (target - target.mean(0)).norm()
    inner = times[1:-1]
    return SmoothTimeReport(error.item(), largest_derivative(original, inner), largest_derivative(refitted, inner))


def refit_embedders(
    old: Sequence[TwoTimeEmbedding], new: Sequence[TwoTimeEmbedding], derivative_penalty: float
) -> SmoothTimeReport:
    """Fit each embedder of a student to the corresponding embedder of the teacher.

    Args:
        old: Embedders of the teacher.
        new: Embedders of the student, changed in place, in the same order.
        derivative_penalty: Weight of the squared derivative along t.

    Returns:
        The report with the largest fit error.
    """
    reports = []
    for before, after in zip(old, new, strict=True):

        def original(t: Tensor, before: TwoTimeEmbedding = before) -> Tensor:
            return before.embed_times(t, t)

        reports.append(refit_embedder(original, after.time_proj, after, derivative_penalty))
    return max(reports, key=lambda report: report.fit_error)


def _randomize_hidden_layer(first: nn.Linear) -> None:
    """Initialise the first layer from a separate generator, so that the student does not depend on the run's seed.

    Features have variance 1/2. Weights and biases each contribute a standard deviation of 2 to the pre-activations.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter, std in (
        (first.weight, 2 * (2 / first.in_features) ** 0.5),
        (first.bias, 2.0),
    ):
        parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
