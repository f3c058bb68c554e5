"""How a network trains on a loss of its own, beside the one that the trainer knows."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ReplicatedOptimizer:
    """Updates a network that every process has a whole of, by the mean of their gradients.

    Args:
        optimizer: Of all that trains.
        clip: Largest norm of the gradients.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip: float) -> None:
        self.optimizer = optimizer
        self._clip = clip

    def step(self, loss: Tensor) -> None:
        """Update by the gradients of a loss, which no wrapper around the trainer's own module is to see."""
        parameters: list[nn.Parameter] = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        if dist.is_available() and dist.is_initialized():
            whole = torch.cat([gradient.flatten() for gradient in gradients])  # one message; each has its latency
            dist.all_reduce(whole)
            gradients = (whole / dist.get_world_size()).split([parameter.numel() for parameter in parameters])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        nn.utils.clip_grad_norm_(parameters, self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
