"""Which parts of a network are sharded together."""

from torch import nn


def blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model of diffusers or transformers, from the first to the last.

    They are what the model itself says must not be split, in `_no_split_modules`, or else the entries of its lists of
    modules; of nested ones the outer.
    """
    names = set(getattr(network, "_no_split_modules", None) or ())
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            listed = isinstance(module, nn.ModuleList)
            if type(child).__name__ in names if names else listed:
                found.append(child)
            else:
                visit(child)

    visit(network)
    return found
