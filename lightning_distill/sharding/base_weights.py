"""Base weights that a network shares with another one, sharded by FSDP2: both gather them from the same shards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves

# torch leaves the engine untyped
_engine: Any = torch.autograd.Variable._execution_engine


@dataclass(frozen=True)
class SharedWeight:
    """A base weight and its attribute in the network that shares it.

    Attributes:
        module: Module of the network.
        name: Name of the weight in `module`.
        base_module: Module of the base.
        base_name: Name of the weight in `base_module`.
    """

    module: nn.Module
    name: str
    base_module: nn.Module
    base_name: str


class BaseUnit:
    """Base weights that are gathered together: those of one block, or those outside all blocks.

    Args:
        base: FSDP2 module of the base that holds the weights.
        weights: The weights.
    """

    def __init__(self, base: FSDPModule, weights: Sequence[SharedWeight]) -> None:
        self.base = base
        self._weights = weights

    def prefetch(self) -> None:
        """Start gathering the weights, in parallel with the current computation."""
        self.base.unshard(async_op=True)

    def unshard(self) -> None:
        """Gather the weights, and assign them to the network."""
        self.base.unshard()
        self._assign()

    def reshard(self) -> None:
        """Free the gathered weights, and assign the shards to the network."""
        self.base.reshard()
        self._assign()

    def _assign(self) -> None:
        for weight in self._weights:
            weight.module._parameters[weight.name] = weight.base_module._parameters[weight.base_name]


class SharedBaseWeights:
    """Gathers the base weights of a network, one block at a time, in its forward and backward passes.

    In a forward pass, the weights of a block are unsharded while the block runs. In a backward pass, they are unsharded from
    the first gradient of the block's outputs until the next block needs its weights. Autograd runs the last recorded operations
    first, so the first block is finished then. Recomputed blocks (activation checkpointing) run in the same order. Weights
    outside all blocks stay unsharded until the end of the pass.

    While a block runs, the next one is prefetched. In a forward pass that is the block that followed it in the last one; in a
    backward pass it is the block that preceded it. FSDP2 gathers a weight into the same memory every time. Tensors that
    autograd has saved therefore hold the gathered weights again when the backward pass reads them.

    Args:
        network: The network that shares the weights.
        root: The weights outside its blocks.
        blocks: Each of its blocks, with the weights in it.
    """

    def __init__(self, network: nn.Module, root: BaseUnit, blocks: dict[nn.Module, BaseUnit]) -> None:
        self._root = root
        self._root_in_backward = False
        self._block_in_backward: BaseUnit | None = None
        self._prefetched: BaseUnit | None = None
        self._last = root
        self._next: dict[BaseUnit, BaseUnit] = {}
        self._previous: dict[BaseUnit, BaseUnit] = {}
        for module, unit in {network: root, **blocks}.items():
            module.register_forward_pre_hook(lambda _, args, unit=unit: self._before_forward(unit))
            module.register_forward_hook(lambda _, args, output, unit=unit: self._after_forward(unit, output))

    def _before_forward(self, unit: BaseUnit) -> None:
        if _in_backward():
            self._unshard_in_backward(unit)
            return
        unit.unshard()
        if unit is not self._root:
            self._next[self._last], self._previous[unit] = unit, self._last
        self._last = unit
        self._prefetch(self._next.get(unit))

    def _after_forward(self, unit: BaseUnit, output: Any) -> None:
        if _in_backward():
            return
        unit.reshard()
        if unit is self._root:
            self._drop_prefetched()
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
        if outputs and torch.is_grad_enabled():
            register_multi_grad_hook(outputs, lambda _: self._unshard_in_backward(unit), mode="any")

    def _unshard_in_backward(self, unit: BaseUnit) -> None:
        if unit is self._root:
            if not self._root_in_backward:
                self._root_in_backward = True
                unit.unshard()
                _engine.queue_callback(self._reshard_root)
            return
        if unit is self._block_in_backward:
            return
        if self._block_in_backward is None:
            _engine.queue_callback(self._reshard_block)
        else:
            self._block_in_backward.reshard()
        unit.unshard()
        self._block_in_backward = unit
        previous = self._previous.get(unit)
        self._prefetch(None if previous is self._root else previous)

    def _prefetch(self, unit: BaseUnit | None) -> None:
        self._prefetched = unit
        if unit is not None:
            unit.prefetch()

    def _drop_prefetched(self) -> None:
        """Free the weights of a prefetched block that did not run."""
        if self._prefetched is not None:
            self._prefetched.unshard()
            self._prefetched.reshard()
            self._prefetched = None

    def _reshard_block(self) -> None:
        if self._block_in_backward is not None:
            self._block_in_backward.reshard()
            self._block_in_backward = None
        self._drop_prefetched()

    def _reshard_root(self) -> None:
        self._root.reshard()
        self._root_in_backward = False


def share_base_weights(network: nn.Module, base: nn.Module, blocks: dict[str, nn.Module]) -> SharedBaseWeights:
    """Register hooks that gather the base weights of a network.

    Args:
        network: Network, some of whose parameters are the very same objects as parameters of `base`.
        base: Network sharded by FSDP2, each block separately.
        blocks: The network's blocks by path; the base has blocks at the same paths.
    """
    places = {
        id(parameter): (module, name)
        for module in base.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }

    def shared_weights(module: nn.Module, excluded: set[nn.Module]) -> list[SharedWeight]:
        return [
            SharedWeight(part, name, *places[id(parameter)])
            for part in module.modules()
            if part not in excluded
            for name, parameter in part._parameters.items()
            if id(parameter) in places
        ]

    def unit(path: str, weights: list[SharedWeight]) -> BaseUnit:
        base_module = base.get_submodule(path)
        assert isinstance(base_module, FSDPModule), "the base is sharded by the same blocks"
        return BaseUnit(base_module, weights)

    in_blocks = {part for block in blocks.values() for part in block.modules()}
    units = {block: unit(path, shared_weights(block, set())) for path, block in blocks.items()}
    return SharedBaseWeights(network, unit("", shared_weights(network, in_blocks)), units)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
