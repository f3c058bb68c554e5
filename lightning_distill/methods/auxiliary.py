"""How a network trains on a loss of its own, beside the one that the trainer knows."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_distill.sharding.protocols import AuxiliaryOptimizer, Sharding, clip_finite


class AuxiliaryTraining:
    """AdamW for a network such as a critic, made on first use: by then the network is on its device.

    Args:
        lr: Learning rate.
        betas: Of AdamW. Without a memory of gradients, the default, the network follows a student that moves.
        clip: Largest norm of the gradients.
    """

    def __init__(self, lr: float, betas: tuple[float, float] = (0.0, 0.99), clip: float = 1.0) -> None:
        self.lr = lr
        self.betas = betas
        self.clip = clip
        self._optimizer: AuxiliaryOptimizer | None = None
        self._pending: dict[str, Any] | None = None

    def optimizer(self, network: nn.Module, sharding: Sharding | None = None) -> AuxiliaryOptimizer:
        """The network's optimizer.

        Args:
            network: The same at each call.
            sharding: The strategy, where it shards networks.
        """
        if self._optimizer is None:
            trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
            adamw = torch.optim.AdamW(trained, lr=self.lr, betas=self.betas, weight_decay=0)
            if self._pending is not None:
                adamw.load_state_dict(self._pending)
                self._pending = None
            if sharding is None:
                self._optimizer = ReplicatedOptimizer(adamw, self.clip)
            else:
                self._optimizer = sharding.auxiliary_optimizer(network, adamw, self.clip)
        return self._optimizer

    def apply_settings(self) -> list[str]:
        """Put the settings in force where a checkpoint had others; what has changed, as texts."""
        changes = []
        for group in self._optimizer.optimizer.param_groups if self._optimizer is not None else ():
            for name, new in (("lr", self.lr), ("betas", self.betas)):
                old = tuple(group[name]) if isinstance(new, tuple) else float(group[name])
                if old != new:
                    changes.append(f"{name} {old} -> {new}")
                    group[name] = new
        return changes

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the state of an optimizer that was saved."""
        self._pending = state
        self._optimizer = None


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
        clip_finite(parameters, self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
