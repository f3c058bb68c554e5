"""The average of a student that is spread over processes."""

import torch
from torch import Tensor, nn

from lightning_distill.models.sharding import forget_gathered, local_part


class ShardedAverage(nn.Module):
    """Exponential moving average of a network's weights, spread like them; otherwise as torch's `AveragedModel`.

    Args:
        module: A network like the one that is averaged, spread in the same way.
        decay: In (0, 1).
    """

    n_averaged: Tensor

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = module
        self.decay = decay
        self.register_buffer("n_averaged", torch.tensor(0))

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move towards a network; the first time, become it."""
        averages, values = ([local_part(p) for p in network.parameters()] for network in (self.module, model))
        if self.n_averaged == 0:
            torch._foreach_copy_(averages, values)
        else:
            torch._foreach_lerp_(averages, values, 1 - self.decay)
        forget_gathered(self.module.parameters())
        self.n_averaged += 1
