"""Networks that share frozen weights with another, as LoRA students share their base with the teacher."""

from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError, first_and_count


def shared_names(module: nn.Module, base: nn.Module | None) -> set[str]:
    """Names of a module's parameters that are the very same objects as parameters of `base`."""
    known = set() if base is None else {id(parameter) for parameter in base.parameters()}
    return {name for name, parameter in module.named_parameters(remove_duplicate=False) if id(parameter) in known}


def own_state_dict(module: nn.Module, base: nn.Module | None) -> dict[str, Tensor]:
    """The state of a module without the parameters that it shares with `base`."""
    shared = shared_names(module, base)
    return {name: value for name, value in module.state_dict().items() if name not in shared}


def check_sharing(module: nn.Module, base: nn.Module) -> None:
    """Check that all frozen parameters of a trained module are those of its base: moving or sharding weights may copy them.

    Raises:
        ConfigurationError: If a frozen parameter is a copy.
    """
    shared = shared_names(module, base)
    copied = [name for name, parameter in module.named_parameters() if not parameter.requires_grad and name not in shared]
    if copied:
        raise ConfigurationError(
            f"set-up copied {first_and_count(copied)} of the weights that LoRA shares with the teacher; set "
            "trainer.strategy to auto, ddp or fsdp2, or student.lora and alignment.critic_lora to null"
        )
