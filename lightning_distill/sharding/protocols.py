"""Interfaces between networks and the strategies that shard them, and the part of a weight that a process holds."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_distill.errors import NonFiniteError
from lightning_distill.sharding.stored_weights import StoredWeights


@runtime_checkable
class Sharding(Protocol):
    """A strategy under which no process holds an unsharded network. All its processes call these methods together."""

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """A tensor reduced over the processes, like `Strategy.reduce` of Lightning."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object of process `src` in all processes, like `Strategy.broadcast` of Lightning."""

    def shard(self, network: nn.Module, weights: StoredWeights | None = None) -> None:
        """Shard a network over the processes, in place.

        Args:
            network: Parameters on the meta device are read from `weights` by name, in the dtype of the parameter; all others
                are taken from the first process.
            weights: Weights of the parameters on the meta device.
        """

    def shard_encoder(self, encoder: nn.Module, weights: StoredWeights) -> None:
        """Shard a frozen text encoder, which may call its submodules past their hooks, in place.

        Args:
            encoder: Encoder with parameters on the meta device.
            weights: Its weights, read in the dtype of the parameters.
        """

    def gather(self, network: nn.Module) -> dict[str, Tensor]:
        """The unsharded parameters of a network by name, on the CPU of the first process; empty on the others."""

    @property
    def has_snapshot(self) -> bool:
        """Whether there is a snapshot of weights."""

    def take_snapshot(self, networks: Sequence[str]) -> None:
        """Copy the weights of some networks, each process its shards, to its CPU; checkpoints save the copy as well.

        Args:
            networks: Paths of the networks within the trainer's module; none drops the snapshot.
        """

    def restore_snapshot(self) -> None:
        """Copy the weights of the snapshot back into their networks."""

    def auxiliary_optimizer(self, network: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> "AuxiliaryOptimizer":
        """The optimizer of a sharded network that trains on a loss of its own, beside the trainer's.

        Args:
            network: A sharded network, such as a critic.
            optimizer: Optimizer of all its trainable parameters.
            clip: Largest norm of its gradients.
        """


@runtime_checkable
class SharesBaseWeights(Sharding, Protocol):
    """A strategy under which networks can share sharded weights."""

    def shard_on_base(self, network: nn.Module, base: nn.Module) -> None:
        """Shard a network, some of whose parameters are the very same objects as those of a sharded one, in place.

        Args:
            network: Parameters of its own are taken from the first process.
            base: Network that is sharded already.
        """


@runtime_checkable
class StepAccounting(Protocol):
    """A strategy that steps, clips and skips by itself, as DeepSpeed does."""

    @property
    def steps_taken(self) -> int:
        """Number of optimizer steps."""

    @property
    def skipped_steps(self) -> int:
        """Number of optimizer steps that were skipped because gradients were not finite."""

    def gradient_norm(self) -> float | None:
        """Norm of the gradients of the last step, before clipping."""


class AuxiliaryOptimizer(Protocol):
    """Trains a network on a loss of its own."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer with its settings and state."""

    def step(self, loss: Tensor) -> None:
        """Update the network by the gradients of a loss; `NonFiniteError`, before any update, if they are not finite."""


@runtime_checkable
class TrainedModule(Protocol):
    """Interface that strategies use of the module that a trainer trains."""

    @property
    def auxiliary_paths(self) -> tuple[str, ...]:
        """Paths of the networks that train on losses of their own, within the module."""

    def auxiliary_optimizers(self) -> dict[str, AuxiliaryOptimizer]:
        """Optimizers of those networks by path."""

    def saved_names(self) -> set[str]:
        """Names of the weights that checkpoints hold."""


def auxiliary_paths(module: Any) -> tuple[str, ...]:
    """Paths of a module's auxiliary networks; none for modules without that interface."""
    return module.auxiliary_paths if isinstance(module, TrainedModule) else ()


def auxiliary_optimizers(module: Any) -> dict[str, AuxiliaryOptimizer]:
    """Optimizers of a module's auxiliary networks by path; none for modules without that interface."""
    return module.auxiliary_optimizers() if isinstance(module, TrainedModule) else {}


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module that checkpoints hold, by name; a shared parameter under each of its names."""
    saved = module.saved_names() if isinstance(module, TrainedModule) else set(module.state_dict())
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: value for name, value in named if name in saved}


def tied_parameters(network: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Modules and attribute names of each parameter that occurs several times, such as a tied embedding."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return [found for found in places.values() if len(found) > 1]


def retie_parameters(places: list[list[tuple[nn.Module, str]]]) -> None:
    """Tie again the parameters that `tied_parameters` found and that became separate since."""
    for (first, attribute), *others in places:
        for module, name in others:
            module._parameters[name] = first._parameters[attribute]


def local_part(parameter: Tensor) -> Tensor:
    """This process's part of a parameter: all of it, the rows of a DTensor, or ZeRO-3's part of the flattened weight."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    return part


def drop_gathered(parameters: Iterator[nn.Parameter]) -> None:
    """Drop the gathered copies that ZeRO-3 holds of small parameters, after their parts have changed."""
    for parameter in parameters:
        status: Any = getattr(parameter, "ds_status", None)
        if status is not None and status.name == "AVAILABLE":
            parameter.partition()  # type: ignore[attr-defined]


def clip_finite(parameters: Sequence[nn.Parameter], clip: float) -> None:
    """Clip the gradients of an auxiliary network; no other check sees its loss, and the student's may not depend on it yet.

    Raises:
        NonFiniteError: If they are not finite.
    """
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    if not torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm):
        raise auxiliary_error()


def auxiliary_error() -> NonFiniteError:
    """The error for gradients of an auxiliary network that are not finite."""
    return NonFiniteError("gradients of an auxiliary network are not finite")
