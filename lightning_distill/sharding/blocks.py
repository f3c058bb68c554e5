"""Which parts of a network are sharded together."""

from torch import nn

from lightning_distill.students.expert_routing import RoutedExperts


def named_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model of diffusers or transformers by their paths, from the first to the last.

    They are what the model itself says must not be split, in `_no_split_modules`, or else the entries of its lists of
    modules; of nested ones the outer.
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
    """The blocks alone."""
    return list(named_blocks(network).values())


def units(network: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: the blocks, and before each the experts in it, which are nearly all of its weights.

    All processes call all experts, in one order, whether these have tokens or not.
    """
    return [unit for block in blocks(network) for unit in (*experts(block), block)]


def experts(block: nn.Module) -> list[nn.Module]:
    """Those that a block sends its tokens to."""
    return [expert for part in block.modules() if isinstance(part, RoutedExperts) for expert in part.experts]
