"""Weights of f-distill: what a difference of scores counts for, by how short of samples a student is there."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_distill.flow.distribution_matching import Divergence, divergence_weight

BINS = 10
MEMORY = 0.99
LARGEST_SCORE = 10.0


class DivergenceWeight(nn.Module):
    """Weights of a batch's differences of scores, from what a discriminator makes of it (f-distill, arXiv 2502.15681).

    The score of a discriminator that has learned is the logarithm of the density ratio. What it lacks is made up for in two
    steps, as in the paper: the ratio is divided by its mean at that noise level, and the weight by its own mean. Both are
    running means over processes and steps here, so that a batch may be small.

    Args:
        divergence: Which one the student is to lessen.
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
        """Weights (B,), about 1 in the mean.

        Args:
            scores: Of the student's samples (B, S), high for real ones.
            tau: Their noise levels (B,).
        """
        ratio = scores.float().mean(1).clamp(-LARGEST_SCORE, LARGEST_SCORE).exp()
        place = (tau * BINS).long().clamp(0, BINS - 1)
        _follow(self.mean_ratio, ratio, place)
        weight = divergence_weight(ratio / self.mean_ratio[place], self.divergence)
        _follow(self.mean_weight, weight, torch.zeros_like(place))
        return weight / self.mean_weight


def _follow(means: Tensor, values: Tensor, place: Tensor) -> None:
    """Move running means towards those of values (B,), each at its place, of all processes."""
    found = torch.stack([torch.bincount(place, weights, len(means)) for weights in (values, torch.ones_like(values))])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(found)
    total, count = found.to(means.dtype)
    means.lerp_(torch.where(count > 0, total / count.clamp_min(1), means), 1 - MEMORY)
