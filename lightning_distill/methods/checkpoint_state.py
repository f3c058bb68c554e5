"""The weights that a method's checkpoints hold: what trains and its EMA, never the teacher."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.sharding.shared_weights import shared_names


def saved_names(names: Iterable[str], frozen: tuple[str, ...], trained: tuple[str, ...]) -> list[str]:
    """Names of weights that checkpoints hold.

    Args:
        names: Names of all weights of the method.
        frozen: Prefixes of the frozen networks.
        trained: Prefixes of the trained networks, which may be parts of frozen ones.
    """
    return [name for name in names if name.startswith(trained) or not name.startswith(frozen)]


def unshared(names: Iterable[str], module: nn.Module, teacher: nn.Module | None) -> list[str]:
    """The names of weights of a module that are not the teacher's own parameters, as the base weights of LoRA are."""
    shared = shared_names(module, teacher)
    return [name for name in names if name not in shared]


def check_loaded_names(found: Mapping[str, Any], expected: set[str], trained: tuple[str, ...]) -> None:
    """Compare the weights of a checkpoint with those of this configuration; loading is not strict.

    Args:
        found: Weights of the checkpoint by name.
        expected: Names of the weights that checkpoints of this configuration hold.
        trained: Prefixes of the weights of the trainer's optimizer; others may be left over, such as a critic that is no
            longer configured.

    Raises:
        ConfigurationError: If a weight of this configuration is missing, or the checkpoint has other weights of a student.
    """
    if surplus := sorted(name for name in found.keys() - expected if name.startswith(trained)):
        raise ConfigurationError(
            f"the checkpoint has the weight {surplus[0]!r} and {len(surplus) - 1} more that this configuration lacks; resume "
            "with the model settings it was trained with"
        )
    if missing := sorted(expected - found.keys()):
        raise ConfigurationError(
            f"the checkpoint lacks the weight {missing[0]!r} and {len(missing) - 1} more of this configuration; resume with "
            "the model settings it was trained with"
        )
