"""Sample weights of f-distill, for other divergences than the reverse Kullback-Leibler divergence."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_distill.flow.distribution_matching import Divergence, divergence_weight

BINS = 10
MEMORY = 0.99
LARGEST_SCORE = 10.0


class DivergenceWeight(nn.Module):
    """Weights of the score differences of a batch, from the scores of a discriminator (f-distill, arXiv 2502.15681).

    The score of a trained discriminator is the logarithm of the density ratio. As in the paper, its errors are corrected in two
    steps. The ratio is divided by its mean at that noise level, and the weight by its mean. Here both are running means over
    processes and steps, so that a batch may be small.

    Args:
        divergence: Divergence that the student minimises.
    """

    mean_ratio: Tensor
    mean_weight: Tensor

    def __init__(self, divergence: Divergence) -> None:
        super().__init__()
        self.divergence: Divergence = divergence
        self.register_buffer("mean_ratio", torch.ones(BINS))
        self.register_buffer("mean_weight", divergence_weight(torch.ones(1), divergence))

    @torch.no_grad()
    def forward(self, scores: Tensor, tau: Tensor) -> Tensor:
        """Weights (B,) with a mean of about 1.

        Args:
            scores: Scores of the student's samples (B, S), high for real ones.
            tau: Noise levels of the samples (B,).
        """
        ratio = scores.float().mean(1).clamp(-LARGEST_SCORE, LARGEST_SCORE).exp()
        place = (tau * BINS).long().clamp(0, BINS - 1)
        _update_means(self.mean_ratio, ratio, place)
        weight = divergence_weight(ratio / self.mean_ratio[place], self.divergence)
        _update_means(self.mean_weight, weight, torch.zeros_like(place))
        return weight / self.mean_weight


def _update_means(means: Tensor, values: Tensor, place: Tensor) -> None:
    """Update running means, one per bin, by values (B,) of all processes.

    Args:
        means: Running means (N,), updated in place.
        values: Values (B,).
        place: Bin of each value (B,), 0 to N - 1.
    """
    found = torch.stack([torch.bincount(place, weights, len(means)) for weights in (values, torch.ones_like(values))])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(found)
    total, count = found.to(means.dtype)
    means.lerp_(torch.where(count > 0, total / count.clamp_min(1), means), 1 - MEMORY)
