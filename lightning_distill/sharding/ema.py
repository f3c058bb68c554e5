"""Exponential moving averages (EMA) of a student, unsharded or sharded."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_distill.sharding.protocols import drop_gathered, local_part


class StudentEMA(AveragedModel):
    """EMA of the trained parameters of a module; frozen parameters are shared with it, not copied.

    Args:
        model: The module.
        multi_avg_fn: Update of lists of parameters, such as `get_ema_multi_avg_fn` returns.
    """

    def __init__(self, model: nn.Module, multi_avg_fn: Callable[..., None]) -> None:
        super().__init__(nn.Module(), multi_avg_fn=multi_avg_fn)
        self._update = multi_avg_fn
        frozen: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.module = copy.deepcopy(model, frozen)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the EMA towards the module's parameters; the first time, copy them."""
        pairs = list(zip(self.module.parameters(), model.parameters(), strict=True))
        own = [(average, parameter) for average, parameter in pairs if average is not parameter]
        if len(own) == len(pairs):
            super().update_parameters(model)
            return
        averages, parameters = ([each.detach() for each in part] for part in zip(*own, strict=True))
        if self.n_averaged == 0:
            torch._foreach_copy_(averages, parameters)
        else:
            self._update(averages, parameters, self.n_averaged)
        for average, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
        self.n_averaged += 1


class ShardedEMA(nn.Module):
    """EMA of a sharded network's weights, sharded like them; otherwise as torch's `AveragedModel`.

    Args:
        module: A network like the averaged one, sharded in the same way.
        decay: Decay, in (0, 1).
    """

    n_averaged: Tensor

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = module
        self.decay = decay
        self.register_buffer("n_averaged", torch.tensor(0))

    @torch.no_grad()
    def start_from(self, model: nn.Module) -> None:
        """Copy the weights of a network, whose low-rank updates have another initialisation."""
        torch._foreach_copy_(*self._local_parts(model))
        drop_gathered(self.module.parameters())

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the EMA towards a network's weights; the first time, copy them."""
        averages, values = self._local_parts(model)
        if self.n_averaged == 0:
            torch._foreach_copy_(averages, values)
        else:
            torch._foreach_lerp_(averages, values, 1 - self.decay)
        drop_gathered(self.module.parameters())
        self.n_averaged += 1

    def _local_parts(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """This process's parts of the EMA and of a network, without the weights that both share."""
        pairs = zip(self.module.parameters(), model.parameters(), strict=True)
        own = [(average, value) for average, value in pairs if average is not value]
        return [local_part(average) for average, _ in own], [local_part(value) for _, value in own]
