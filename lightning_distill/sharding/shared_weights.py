"""Networks that share frozen weights: which are shared, what is saved of the others, and an average that shares them too."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_distill.errors import ConfigurationError


def shared_names(module: nn.Module, base: nn.Module | None) -> set[str]:
    """Names of a module's parameters that are those of another, the very same objects."""
    known = set() if base is None else {id(parameter) for parameter in base.parameters()}
    return {name for name, parameter in module.named_parameters(remove_duplicate=False) if id(parameter) in known}


def own_state_dict(module: nn.Module, base: nn.Module | None) -> dict[str, Tensor]:
    """The state of a module without the parameters that it shares with another."""
    shared = shared_names(module, base)
    return {name: value for name, value in module.state_dict().items() if name not in shared}


def check_sharing(module: nn.Module, base: nn.Module) -> None:
    """Make sure that all that is frozen in a module which trains is the base's: what moves or shards weights may copy them.

    Raises:
        ConfigurationError: If a frozen parameter has a memory of its own.
    """
    shared = shared_names(module, base)
    copied = [name for name, parameter in module.named_parameters() if not parameter.requires_grad and name not in shared]
    if copied:
        raise ConfigurationError(
            f"{copied[0]} and {len(copied) - 1} more weights, which are to be the teacher's own, were copied in set-up; use "
            "trainer.strategy auto, ddp or fsdp2 with LoRA, or set student.lora and alignment.critic_lora to null"
        )


class StudentEMA(AveragedModel):
    """An exponential moving average of what trains in a module; what is frozen is not copied but shared with it.

    Args:
        model: The module.
        multi_avg_fn: How lists of parameters are averaged, as of `get_ema_multi_avg_fn`.
    """

    def __init__(self, model: nn.Module, multi_avg_fn: Callable[..., None]) -> None:
        super().__init__(nn.Module(), multi_avg_fn=multi_avg_fn)
        self._move = multi_avg_fn
        frozen: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.module = copy.deepcopy(model, frozen)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the module's parameters."""
        pairs = list(zip(self.module.parameters(), model.parameters(), strict=True))
        own = [(average, parameter) for average, parameter in pairs if average is not parameter]
        if len(own) == len(pairs):
            super().update_parameters(model)
            return
        averages, parameters = ([each.detach() for each in side] for side in zip(*own, strict=True))
        if self.n_averaged == 0:
            torch._foreach_copy_(averages, parameters)
        else:
            self._move(averages, parameters, self.n_averaged)
        for average, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
        self.n_averaged += 1
