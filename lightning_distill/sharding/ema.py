"""The average of a student that is spread over processes."""

import torch
from torch import Tensor, nn

from lightning_distill.sharding.protocols import drop_gathered, local_part


class ShardedEMA(nn.Module):
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
    def start_from(self, model: nn.Module) -> None:
        """Become a network, whose low-rank updates were drawn apart."""
        torch._foreach_copy_(*self._parts(model))
        drop_gathered(self.module.parameters())

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move towards a network; the first time, become it."""
        averages, values = self._parts(model)
        if self.n_averaged == 0:
            torch._foreach_copy_(averages, values)
        else:
            torch._foreach_lerp_(averages, values, 1 - self.decay)
        drop_gathered(self.module.parameters())
        self.n_averaged += 1

    def _parts(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """What this process has of the average and of a network, but for weights that both share."""
        pairs = zip(self.module.parameters(), model.parameters(), strict=True)
        own = [(average, value) for average, value in pairs if average is not value]
        return [local_part(average) for average, _ in own], [local_part(value) for _, value in own]
