"""Small heads that tell a student's samples from real ones by a network's features."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.adversarial import r1_penalty
from lightning_distill.methods.sharded_networks import ShardedNetworks
from lightning_distill.sharding.protocols import AuxiliaryOptimizer

TIME_FREQUENCIES = 8


class DiscriminatorLoss(Protocol):
    """Such as `flow.adversarial.hinge_discriminator`."""

    def __call__(self, real: Tensor, fake: Tensor) -> Tensor:
        """Loss (B,) of scores (B, S)."""


class Discriminator(nn.Module):
    """A head for each layer of features, which scores every token (ADD, arXiv 2311.17042; LADD, arXiv 2403.12015).

    Heads are told the noise level. The prompt they need not be told: the features have seen it. Tokens are judged one by one,
    since attention has brought to each of them what it needs to know of the others.

    Args:
        widths: Of the features of each layer.
        hidden: Width of the heads.
    """

    def __init__(self, widths: Sequence[int], hidden: int = 256) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # the same in all processes, which keep heads of their own
            torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs too, and leave them so
            self.heads = nn.ModuleList(Head(width, hidden) for width in widths)

    def forward(self, features: Sequence[Tensor], tau: Tensor) -> Tensor:
        """Scores (B, S) of all layers' tokens, float32, high for real ones.

        Args:
            features: (B, N, D) of each layer.
            tau: Noise levels (B,) of what the features are of.
        """
        # Scores are close to each other where it matters, too close for 16 bits.
        with torch.autocast(tau.device.type, enabled=False):
            scores = [head(tokens.float(), tau) for head, tokens in zip(self.heads, features, strict=True)]
        return torch.cat(scores, 1)


class Head(nn.Module):
    """Scores of one layer's tokens.

    Args:
        width: Of the tokens.
        hidden: Of the layers within.
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


def check_sharding_of_heads(module: ShardedNetworks, remedy: str) -> None:
    """Refuse a strategy that spreads networks: heads are whole, and look into networks that are not.

    Raises:
        ConfigurationError: If the trainer has one.
    """
    if module.sharding is not None:
        raise ConfigurationError(
            f"{type(module).__name__} has a discriminator on the features of a network, which {type(module.sharding).__name__} "
            f"takes apart; {remedy}"
        )


def discriminator_update(
    discriminator: Discriminator,
    optimizer: AuxiliaryOptimizer,
    real: Sequence[Tensor],
    fake: Sequence[Tensor],
    tau: Tensor,
    loss: DiscriminatorLoss,
    r1_weight: float = 0.0,
) -> dict[str, Tensor]:
    """One step of the heads, without gradient to the features.

    The penalty is on the heads' gradient in the features, not in the sample, as in ADD (arXiv 2311.17042): it is exact, and
    second derivatives pass the heads alone. Fused attention has none.

    Args:
        discriminator: Of the heads.
        optimizer: Theirs.
        real: Features of real samples at tau.
        fake: Of the student's.
        tau: (B,).
        loss: Of both scores.
        r1_weight: Weight of R1, the squared norm of the gradient at real samples; 0 is none.

    Returns:
        Scalars to log: the loss, and the mean score of both kinds.
    """
    with torch.enable_grad():
        seen = [tokens.detach().float().requires_grad_(r1_weight > 0) for tokens in real]
        scores = discriminator(seen, tau)
        judged = discriminator([tokens.detach() for tokens in fake], tau)
        value = loss(scores, judged)
        logs = {"discriminator_loss": value, "score_real": scores, "score_fake": judged}
        if r1_weight > 0:
            logs["r1"] = r1_penalty(scores, seen)
            value = value + r1_weight * logs["r1"]
    optimizer.step(value.mean())
    return {name: value.detach().mean() for name, value in logs.items()}


def sample_gradient_loss(x: Tensor, judge: Callable[[Tensor], Tensor]) -> Tensor:
    """The loss (B,) that `judge` makes of samples, with the gradient in them alone.

    The gradient is taken here, so that the judge's networks keep no graph and get no gradients in the backward pass.

    Args:
        x: Samples (B, ...) with a graph.
        judge: Loss (B,) of samples, each of its own row.
    """
    if not x.requires_grad:
        return judge(x)
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        loss = judge(point)
        (gradient,) = torch.autograd.grad(loss.sum(), point)
    return loss.detach() + ((x - x.detach()) * gradient).flatten(1).sum(1)
