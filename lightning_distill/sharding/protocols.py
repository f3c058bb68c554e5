"""What networks ask of a strategy that spreads their weights over processes, and what of a weight is here."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_distill.errors import NonFiniteError
from lightning_distill.sharding.stored_weights import StoredWeights


@runtime_checkable
class Sharding(Protocol):
    """A strategy under which no process holds a whole network. All its processes call these methods together."""

    def shard(self, network: nn.Module, weights: StoredWeights | None = None) -> None:
        """Spread a network over the processes, in place.

        Args:
            network: Parameters on the meta device are read from `weights` by their names, in the dtype they have; all others
                are taken from the first process.
            weights: Where to read from.
        """

    def shard_encoder(self, encoder: nn.Module, weights: StoredWeights) -> None:
        """Spread a frozen text encoder, which may call its parts in ways of its own, in place.

        Args:
            encoder: Its parameters are on the meta device.
            weights: Where to read them from, in the dtype they have.
        """

    def gather(self, network: nn.Module) -> dict[str, Tensor]:
        """A network's whole parameters by name, on the CPU of the first process; of the others, nothing."""

    @property
    def keeps(self) -> bool:
        """Whether there is a copy of weights that was kept."""

    def keep(self, networks: Sequence[str]) -> None:
        """Keep a copy of weights as they are, each process of its parts on its CPU, and save it in checkpoints as well.

        Args:
            networks: Names of the trainer's module's networks; none drops the copy there is.
        """

    def restore_snapshot(self) -> None:
        """Give the weights that were kept back to their networks."""

    def auxiliary_optimizer(self, network: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> "AuxiliaryOptimizer":
        """How a network that was spread trains on a loss of its own, beside the one that the trainer knows.

        Args:
            network: Such as a critic.
            optimizer: Of all its parameters.
            clip: Largest norm of its gradients.
        """


@runtime_checkable
class SharesBaseWeights(Sharding, Protocol):
    """A strategy under which networks can share the weights that are spread."""

    def shard_on_base(self, network: nn.Module, base: nn.Module) -> None:
        """Spread a network some of whose parameters are those of another, the very same objects, in place.

        Args:
            network: What is its own is taken from the first process.
            base: Spread already.
        """


class AuxiliaryOptimizer(Protocol):
    """Trains a network on a loss of its own."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Whose settings and state they are."""

    def step(self, loss: Tensor) -> None:
        """Update the network by the gradients of a loss; `NonFiniteError` if they are not finite, before it is changed."""


def tied_parameters(network: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Modules and attributes of each parameter that is in several places, such as a tied embedding."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return [found for found in places.values() if len(found) > 1]


def retie_parameters(places: list[list[tuple[nn.Module, str]]]) -> None:
    """Put one parameter into all the places that `tied_parameters` has found, where each got its own since."""
    for (first, attribute), *others in places:
        for module, name in others:
            module._parameters[name] = first._parameters[attribute]


def local_part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter: all of it, the rows of a DTensor, or ZeRO-3's part of the flattened weight."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    return part


def drop_gathered(parameters: Iterator[nn.Parameter]) -> None:
    """Drop the whole weights that ZeRO-3 keeps of small parameters, after a change of the parts."""
    for parameter in parameters:
        status: Any = getattr(parameter, "ds_status", None)
        if status is not None and status.name == "AVAILABLE":
            parameter.partition()  # type: ignore[attr-defined]


def clip_finite(parameters: Sequence[nn.Parameter], clip: float) -> None:
    """Clip gradients, of whose loss nobody else would see that it is not finite: the student's may not depend on it yet.

    Raises:
        NonFiniteError: If they are not finite.
    """
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    if not torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm):
        raise auxiliary_error()


def auxiliary_error() -> NonFiniteError:
    """What is said of gradients of a network that trains on a loss of its own."""
    return NonFiniteError(
        "gradients of a critic or discriminator are not finite; the weights and checkpoints are as they were before: lower its "
        "learning rate, and resume with --ckpt_path"
    )
