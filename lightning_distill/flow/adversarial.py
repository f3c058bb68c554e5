"""Losses of a discriminator and of what it judges, of scores that are high for what looks real.

Scores are (B, S), of S places in each sample; losses are (B,).
"""

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """`max(0, 1 - D(real)) + max(0, 1 + D(fake))` (arXiv 1705.02894; ADD, arXiv 2311.17042)."""
    return (relu(1 - real) + relu(1 + fake)).mean(1)


def hinge_generator(fake: Tensor) -> Tensor:
    """`-D(fake)`."""
    return -fake.mean(1)


def logistic_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """`-log sigmoid(D(real)) - log sigmoid(-D(fake))` (arXiv 1406.2661; DMD2, arXiv 2405.14867)."""
    return (softplus(-real) + softplus(fake)).mean(1)


def logistic_generator(fake: Tensor) -> Tensor:
    """`-log sigmoid(D(fake))`, which does not saturate."""
    return softplus(-fake).mean(1)


def r1_penalty(scores: Tensor, features: list[Tensor]) -> Tensor:
    """Squared norm of the gradient of a sample's mean score in what was judged (arXiv 1801.04406).

    Args:
        scores: (B, S), with a graph to the features.
        features: (B, ...) each.

    Returns:
        Penalty, (B,), with a graph of its own.
    """
    gradients = torch.autograd.grad(scores.mean(1).sum(), features, create_graph=True)
    return torch.stack([gradient.square().flatten(1).sum(1) for gradient in gradients]).sum(0)
