"""Submodules that are sharded and gathered as units."""

from torch import nn

from lightning_distill.students.expert_routing import RoutedExperts


def named_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a diffusers or transformers model by path, in the order of its submodules.

    Blocks are the modules of the classes in the model's `_no_split_modules`. A model without that attribute has the entries of
    its module lists as blocks, of nested lists those of the outer one.
    """
    names = set(getattr(network, "_no_split_modules", None) or ())
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            listed = isinstance(module, nn.ModuleList)
            if type(child).__name__ in names if names else listed:
                found[f"{prefix}{name}"] = child
            else:
                visit(child, f"{prefix}{name}.")

    visit(network, "")
    return found


def blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks without their paths."""
    return list(named_blocks(network).values())


def units(network: nn.Module) -> list[nn.Module]:
    """Modules that are gathered separately: the blocks, and before each block its experts, which hold most of its weights.

    All processes call all experts in the same order, including experts without tokens.
    """
    return [unit for block in blocks(network) for unit in (*experts(block), block)]


def experts(block: nn.Module) -> list[nn.Module]:
    """The experts to which a block routes its tokens."""
    return [expert for part in block.modules() if isinstance(part, RoutedExperts) for expert in part.experts]
