"""Discriminator and generator losses; a high score means that a sample looks real.

Scores are (B, S), with S positions per sample. Losses are (B,).
"""

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss, `max(0, 1 - D(real)) + max(0, 1 + D(fake))` (arXiv 1705.02894; ADD, arXiv 2311.17042)."""
    return (relu(1 - real) + relu(1 + fake)).mean(1)


def hinge_generator(fake: Tensor) -> Tensor:
    """Generator loss of the hinge GAN, `-D(fake)`."""
    return -fake.mean(1)


def logistic_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Logistic loss, `-log sigmoid(D(real)) - log sigmoid(-D(fake))` (arXiv 1406.2661; DMD2, arXiv 2405.14867)."""
    return (softplus(-real) + softplus(fake)).mean(1)


def logistic_generator(fake: Tensor) -> Tensor:
    """Non-saturating generator loss, `-log sigmoid(D(fake))`."""
    return softplus(-fake).mean(1)


def r1_penalty(scores: Tensor, features: list[Tensor]) -> Tensor:
    """R1 penalty: squared norm of the gradient of a sample's mean score with respect to its features (arXiv 1801.04406).

    Args:
        scores: (B, S), computed from the features with a graph.
        features: Inputs of the discriminator, (B, ...) each.

    Returns:
        Penalty, (B,), differentiable.
    """
    gradients = torch.autograd.grad(scores.mean(1).sum(), features, create_graph=True)
    return torch.stack([gradient.square().flatten(1).sum(1) for gradient in gradients]).sum(0)
