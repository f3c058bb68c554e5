"""Auxiliary networks, such as a critic or a discriminator: how they train beside the student."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError, NonFiniteError
from lightning_distill.sharding.protocols import AuxiliaryOptimizer, Sharding, clip_finite


@dataclass(frozen=True)
class AuxiliaryLoss:
    """Loss of an auxiliary network, which takes one optimizer step on it.

    Attributes:
        network: Path of the network within the method.
        loss: Scalar, differentiable in the network.
    """

    network: str
    loss: Tensor


@dataclass
class AuxiliaryTraining:
    """Training of one auxiliary network by AdamW.

    Attributes:
        lr: Learning rate.
        betas: AdamW's betas. With the default, without momentum, the network follows a moving student.
        clip: Largest norm of the gradients.
        reads_features: Whether the network reads features of another network's layers, as discriminators do.
        optimizer: The optimizer, built at its first use, when the network is on its device.
        saved_state: State of the optimizer in a checkpoint, until the optimizer is built.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    lr: float
    betas: tuple[float, float] = (0.0, 0.99)
    clip: float = 1.0
    reads_features: bool = False
    optimizer: AuxiliaryOptimizer | None = field(default=None, repr=False)
    saved_state: dict[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.lr < math.inf or not self.clip > 0 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigurationError(
                f"AuxiliaryTraining has lr {self.lr}, betas {self.betas} and clip {self.clip}; set lr to 0 or more, betas "
                "within [0, 1), and clip above 0"
            )

    def apply_settings(self) -> list[str]:
        """Replace the optimizer's settings of a checkpoint by these; returns a text for each change."""
        changes = []
        for group in self.optimizer.optimizer.param_groups if self.optimizer is not None else ():
            for name, new in (("lr", self.lr), ("betas", self.betas)):
                old = tuple(group[name]) if isinstance(new, tuple) else float(group[name])
                if old != new:
                    changes.append(f"{name} {old} -> {new}")
                    group[name] = new
        return changes


class AuxiliaryNetworks:
    """The auxiliary networks of a method, each with an optimizer of its own.

    A method adds them in its constructor. The base's training step updates them with the losses that `objective` yields.

    Args:
        get_network: Function from a path within the method to the network there.
    """

    def __init__(self, get_network: Callable[[str], nn.Module]) -> None:
        self._get_network = get_network
        self._trainings: dict[str, AuxiliaryTraining] = {}

    def add(self, path: str, training: AuxiliaryTraining) -> None:
        """Train the network at a path of the method, where it may be built later."""
        self._trainings[path] = training

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the networks within the method."""
        return tuple(self._trainings)

    @property
    def feature_readers(self) -> tuple[str, ...]:
        """Paths of the networks that read features of another network's layers."""
        return tuple(path for path, training in self._trainings.items() if training.reads_features)

    def optimizer(self, path: str, sharding: Sharding | None = None) -> AuxiliaryOptimizer:
        """The optimizer of a network.

        Args:
            path: Path of the network.
            sharding: Strategy that shards the network, if one does.
        """
        training = self._trainings[path]
        if training.optimizer is None:
            network = self._get_network(path)
            trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
            adamw = torch.optim.AdamW(trained, lr=training.lr, betas=training.betas, weight_decay=0)
            if training.saved_state is not None:
                adamw.load_state_dict(training.saved_state)
                training.saved_state = None
            if sharding is None:
                training.optimizer = ReplicatedOptimizer(adamw, training.clip)
            else:
                training.optimizer = sharding.auxiliary_optimizer(network, adamw, training.clip)
        return training.optimizer

    def optimizers(self, sharding: Sharding | None = None) -> dict[str, AuxiliaryOptimizer]:
        """The optimizers of all networks by path, built if need be."""
        return {path: self.optimizer(path, sharding) for path in self._trainings}

    def set_optimizer(self, path: str, optimizer: AuxiliaryOptimizer) -> None:
        """Replace the optimizer of a network."""
        self._trainings[path].optimizer = optimizer

    def step(self, auxiliary: AuxiliaryLoss, sharding: Sharding | None = None) -> None:
        """Update a network by the gradients of its loss.

        Raises:
            NonFiniteError: With the name of the network, before any update, if they are not finite.
        """
        try:
            self.optimizer(auxiliary.network, sharding).step(auxiliary.loss)
        except NonFiniteError as error:
            name = auxiliary.network.rpartition(".")[2]
            raise NonFiniteError(f"gradients of the {name} are not finite", name) from error

    def apply_settings(self) -> list[str]:
        """Replace the settings of a checkpoint by those of this run; returns a text for each change."""
        return [f"{path} {change}" for path, training in self._trainings.items() for change in training.apply_settings()]

    def state_dict(self) -> dict[str, Any]:
        """States of the optimizers by path, for networks that are not sharded."""
        return {path: optimizer.optimizer.state_dict() for path, optimizer in self.optimizers().items()}

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Continue from saved states; those of networks that this method lacks are ignored."""
        for path, state in states.items():
            if path in self._trainings:
                self._trainings[path].saved_state = state
                self._trainings[path].optimizer = None


class ReplicatedOptimizer:
    """Updates a network that every process holds unsharded, by the mean of their gradients.

    Args:
        optimizer: Optimizer of all trainable parameters.
        clip: Largest norm of the gradients.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip: float) -> None:
        self.optimizer = optimizer
        self._clip = clip

    def step(self, loss: Tensor) -> None:
        """Update by the gradients of a loss; the wrapper of the trainer's module does not see this backward pass."""
        parameters: list[nn.Parameter] = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        if dist.is_available() and dist.is_initialized():
            flat = torch.cat([gradient.flatten() for gradient in gradients])  # one message, because each has its latency
            dist.all_reduce(flat)
            gradients = (flat / dist.get_world_size()).split([parameter.numel() for parameter in parameters])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        clip_finite(parameters, self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
