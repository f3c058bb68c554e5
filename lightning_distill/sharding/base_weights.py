"""Networks on the frozen weights of another that FSDP2 has spread: what computes gathers them from the one set of parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves

# torch leaves these without types
_engine: Any = torch.autograd.Variable._execution_engine


@dataclass(frozen=True)
class Place:
    """Where a weight stands in the network that borrows it, and in the one that it is of.

    Attributes:
        module: Of the borrower.
        name: Of the weight there.
        source: Module of the lender.
        source_name: Of the weight there.
    """

    module: nn.Module
    name: str
    source: nn.Module
    source_name: str


class BaseUnit:
    """Weights of a block, or of what is outside all blocks, that are gathered together.

    Args:
        lender: The block that they are of, as FSDP2 has spread it.
        places: Of each of them.
    """

    def __init__(self, lender: FSDPModule, places: Sequence[Place]) -> None:
        self._lender = lender
        self._places = places

    def fetch(self) -> None:
        """Begin to gather, beside what is computed now."""
        self._lender.unshard(async_op=True)

    def open(self) -> None:
        """Let the borrower have whole weights."""
        self._lender.unshard()
        self._point()

    def close(self) -> None:
        """Drop the whole weights; the borrower has parts again."""
        self._lender.reshard()
        self._point()

    def _point(self) -> None:
        for place in self._places:
            place.module._parameters[place.name] = place.source._parameters[place.source_name]


class BaseWeights:
    """Gathers the weights that a network borrows, a block at a time, for its forward and its backward passes.

    Forward, a block has whole weights for as long as it computes. In a backward pass it has them from the first gradient of its
    results until the next block's turn: autograd runs what was recorded last first, so it is done with a block then, and blocks
    that are run again, as under checkpointing, are so in their turn. What is outside all blocks stays whole to the end of a
    pass. The unit that came next in the pass before is fetched meanwhile. FSDP2 gives a weight the same memory whenever it
    gathers it, so what autograd has saved is whole when it is looked at.

    Args:
        network: That borrows.
        root: What is outside its blocks.
        blocks: Each of its blocks with what it borrows.
    """

    def __init__(self, network: nn.Module, root: BaseUnit, blocks: dict[nn.Module, BaseUnit]) -> None:
        self._root = root
        self._root_stays = False
        self._block: BaseUnit | None = None
        self._ahead: BaseUnit | None = None
        self._last = root
        self._next: dict[BaseUnit, BaseUnit] = {}
        self._previous: dict[BaseUnit, BaseUnit] = {}
        for module, unit in {network: root, **blocks}.items():
            module.register_forward_pre_hook(lambda _, args, unit=unit: self._enter(unit))
            module.register_forward_hook(lambda _, args, result, unit=unit: self._leave(unit, result))

    def _enter(self, unit: BaseUnit) -> None:
        if _in_backward():
            self._hold(unit)
            return
        unit.open()
        if unit is not self._root:
            self._next[self._last], self._previous[unit] = unit, self._last
        self._last = unit
        self._look_ahead(self._next.get(unit))

    def _leave(self, unit: BaseUnit, result: Any) -> None:
        if _in_backward():
            return
        unit.close()
        if unit is self._root:
            self._forget_ahead()
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
        if results and torch.is_grad_enabled():
            register_multi_grad_hook(results, lambda _: self._hold(unit), mode="any")

    def _hold(self, unit: BaseUnit) -> None:
        """Keep a unit whole in a backward pass."""
        if unit is self._root:
            if not self._root_stays:
                self._root_stays = True
                unit.open()
                _engine.queue_callback(self._release_root)
            return
        if unit is self._block:
            return
        if self._block is None:
            _engine.queue_callback(self._release_block)
        else:
            self._block.close()
        unit.open()
        self._block = unit
        before = self._previous.get(unit)
        self._look_ahead(None if before is self._root else before)

    def _look_ahead(self, unit: BaseUnit | None) -> None:
        self._ahead = unit
        if unit is not None:
            unit.fetch()

    def _forget_ahead(self) -> None:
        """Drop what was fetched for a turn that did not come."""
        if self._ahead is not None:
            self._ahead.open()
            self._ahead.close()
            self._ahead = None

    def _release_block(self) -> None:
        if self._block is not None:
            self._block.close()
            self._block = None
        self._forget_ahead()

    def _release_root(self) -> None:
        self._root.close()
        self._root_stays = False


def share_base_weights(network: nn.Module, base: nn.Module, blocks: dict[str, nn.Module]) -> BaseWeights:
    """Let a network gather the weights that it shares with another.

    Args:
        network: Some of whose parameters are those of `base`, the very same objects.
        base: Spread by FSDP2, its blocks by themselves.
        blocks: Of the network, by their paths, which are those of the base's.
    """
    known = {
        id(parameter): (module, name)
        for module in base.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }

    def places(module: nn.Module, without: set[nn.Module]) -> list[Place]:
        found = []
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if part not in without and id(parameter) in known:
                    found.append(Place(part, name, *known[id(parameter)]))
        return found

    def unit(path: str, found: list[Place]) -> BaseUnit:
        lender = base.get_submodule(path)
        assert isinstance(lender, FSDPModule), "the base is spread by the same blocks"
        return BaseUnit(lender, found)

    inside = {part for block in blocks.values() for part in block.modules()}
    units = {block: unit(path, places(block, set())) for path, block in blocks.items()}
    return BaseWeights(network, unit("", places(network, inside)), units)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
