"""The weights that a method's checkpoints hold: what trains and its EMA, never the teacher."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError, first_and_count
from lightning_distill.sharding.shared_weights import shared_names

Shape = tuple[int, ...]

LORA_A = ".lora_A."
"""Part of the names of LoRA weights whose rows are the rank."""


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


def check_loaded_weights(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], trained: tuple[str, ...], checkpoint: str
) -> None:
    """Compare the weights of a checkpoint with those of this configuration; loading is not strict.

    Args:
        found: Weights of the checkpoint by name.
        expected: The weights that checkpoints of this configuration hold, by name.
        trained: Prefixes of the weights of the trainer's optimizer; others may be left over, such as a critic that is no
            longer configured.
        checkpoint: Name of the checkpoint, for messages.

    Raises:
        ConfigurationError: If a weight of this configuration is missing or has another shape, or the checkpoint has other
            weights of a student.
    """
    if surplus := sorted(name for name in found.keys() - expected.keys() if name.startswith(trained)):
        raise ConfigurationError(
            f"{checkpoint} has the weight {first_and_count(surplus)} that this configuration lacks; use the model settings it "
            "was trained with"
        )
    if missing := sorted(expected.keys() - found.keys()):
        raise ConfigurationError(
            f"{checkpoint} lacks the weight {first_and_count(missing)} of this configuration; use the model settings it was "
            "trained with"
        )
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    check_shapes({name: tuple(found[name].shape) for name in expected}, shapes, checkpoint)


def check_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], checkpoint: str) -> None:
    """Compare the shapes of a checkpoint's weights with those of this configuration.

    Args:
        found: Shapes in the checkpoint by name.
        expected: Shapes in this configuration by name, some or all of the same names.
        checkpoint: Name of the checkpoint, for messages.

    Raises:
        ConfigurationError: If one differs.
    """
    for name in expected:
        if found[name] == expected[name]:
            continue
        if LORA_A in name:
            check_lora_rank({name: found[name]}, expected[name][0], checkpoint)
        raise ConfigurationError(
            f"the weight {name!r} has shape {found[name]} in {checkpoint}, and {expected[name]} in this configuration; use the "
            "model settings it was trained with"
        )


def check_lora_rank(found: Mapping[str, Shape], rank: int, checkpoint: str) -> None:
    """Compare the rank of a checkpoint's LoRA weights with that of this configuration.

    Args:
        found: Shapes of the checkpoint's weights by name.
        rank: Configured rank.
        checkpoint: Name of the checkpoint, for messages.

    Raises:
        ConfigurationError: If it differs.
    """
    for name, shape in found.items():
        if LORA_A in name and shape[0] != rank:
            raise ConfigurationError(
                f"student.lora.rank is {rank}, and {checkpoint} has LoRA weights of rank {shape[0]}; set it to {shape[0]}"
            )
