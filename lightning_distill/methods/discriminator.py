"""Discriminator heads on the features of a network."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_distill.flow.adversarial import r1_penalty

TIME_FREQUENCIES = 8


class DiscriminatorLoss(Protocol):
    """A loss such as `flow.adversarial.hinge_discriminator`."""

    def __call__(self, real: Tensor, fake: Tensor) -> Tensor:
        """Loss (B,) of scores (B, S)."""


class Discriminator(nn.Module):
    """One head per layer of features, which scores every token (ADD, arXiv 2311.17042; LADD, arXiv 2403.12015).

    Heads receive the noise level. They do not receive the prompt, on which the features depend already. Each token is scored by
    itself, because attention has mixed the others into it.

    Args:
        widths: Widths of the features of each layer.
        hidden: Width of the heads.
    """

    def __init__(self, widths: Sequence[int], hidden: int = 256) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # equal heads in all processes, which hold a copy each
            torch.default_generator.manual_seed(0)  # torch.manual_seed would change the seeds of GPUs too
            self.heads = nn.ModuleList(Head(width, hidden) for width in widths)

    def forward(self, features: Sequence[Tensor], tau: Tensor) -> Tensor:
        """Scores (B, S) of the tokens of all layers, float32, high for real samples.

        Args:
            features: Tokens (B, N, D) of each layer.
            tau: Noise levels (B,) of the samples.
        """
        # Scores are close to each other near the decision boundary, too close for 16 bits.
        with torch.autocast(tau.device.type, enabled=False):
            scores = [head(tokens.float(), tau) for head, tokens in zip(self.heads, features, strict=True)]
        return torch.cat(scores, 1)


class Head(nn.Module):
    """Scores the tokens of one layer.

    Args:
        width: Width of the tokens.
        hidden: Width of the hidden layers.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.tokens = nn.Linear(width, hidden)
        self.time = nn.Linear(2 * TIME_FREQUENCIES, hidden)
        self.score = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def forward(self, tokens: Tensor, tau: Tensor) -> Tensor:
        """Scores (B, N) of tokens (B, N, D)."""
        angles = tau[:, None] * torch.arange(1, TIME_FREQUENCIES + 1, device=tau.device) * torch.pi
        time = self.time(torch.cat([angles.cos(), angles.sin()], -1))
        scores: Tensor = self.score(self.tokens(self.norm(tokens)) + time[:, None])
        return scores[..., 0]


def discriminator_loss(
    discriminator: Discriminator,
    real: Sequence[Tensor],
    fake: Sequence[Tensor],
    tau: Tensor,
    loss: DiscriminatorLoss,
    r1_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the heads, without gradient to the features.

    As in ADD (arXiv 2311.17042), the penalty is on the heads' gradient in the features, not in the sample. It is exact. Its
    second derivatives pass through the heads alone, because fused attention has none.

    Args:
        discriminator: The heads.
        real: Features of real samples at tau.
        fake: Features of the student's samples at tau.
        tau: Noise levels (B,).
        loss: Loss of both scores.
        r1_weight: Weight of R1, the squared norm of the gradient at real samples; 0 is no penalty.

    Returns:
        Mean loss, and scalars to log: the loss without penalty, the mean scores of both kinds, and R1.
    """
    features = [tokens.detach().float().requires_grad_(r1_weight > 0) for tokens in real]
    real_scores = discriminator(features, tau)
    fake_scores = discriminator([tokens.detach() for tokens in fake], tau)
    value = loss(real_scores, fake_scores)
    logs = {"discriminator_loss": value, "score_real": real_scores, "score_fake": fake_scores}
    if r1_weight > 0:
        logs["r1"] = r1_penalty(real_scores, features)
        value = value + r1_weight * logs["r1"]
    return value.mean(), {name: each.detach().mean() for name, each in logs.items()}


def sample_gradient_loss(x: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The loss (B,) of samples, with its gradient in the samples alone.

    The gradient is computed here, so that the networks within `loss_of` store no graph and get no gradients in the backward
    pass.

    Args:
        x: Samples (B, ...) with a graph.
        loss_of: Function from samples to their losses (B,), each of its own row.
    """
    if not x.requires_grad:
        return loss_of(x)
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        loss = loss_of(point)
        (gradient,) = torch.autograd.grad(loss.sum(), point)
    return loss.detach() + ((x - x.detach()) * gradient).flatten(1).sum(1)
