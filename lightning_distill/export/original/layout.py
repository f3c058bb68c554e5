"""Tables of original layouts: where each layer of a diffusers transformer is in the authors' code."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Place of a layer, or of a single parameter, in the original layout.

    Attributes:
        name: Original name.
        position: Position in a fused layer, whose parts are concatenated along their outputs.
        sizes: Relative numbers of outputs of the parts.
        swapped: Whether the original has the two halves of the outputs in the other order: shift and scale in place of scale
            and shift.
        weight: Original name of the parameter `weight`.
    """

    name: str
    position: int = 0
    sizes: tuple[int, ...] = (1,)
    swapped: bool = False
    weight: str = "weight"


def fused(name: str, *parts: str, sizes: tuple[int, ...] | None = None) -> dict[str, Place]:
    """Places of layers that the original has as one; of equal size by default."""
    return {part: Place(name, position, sizes or (1,) * len(parts)) for position, part in enumerate(parts)}


def renamed(names: Mapping[str, str]) -> dict[str, Place]:
    """Places of layers that have another name only."""
    return {name: Place(original) for name, original in names.items()}


@dataclass(frozen=True)
class Stack:
    """Numbered blocks.

    Attributes:
        name: Original name of the list.
        places: Places by name within a block.
        last: Places that differ in the last block.
    """

    name: str
    places: Mapping[str, Place]
    last: Mapping[str, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """Original layout of a family's transformer.

    Attributes:
        stacks: Lists of blocks by their name in diffusers.
        places: Places of layers outside of the blocks.
        keeps_others: Whether all other layers have the same name in both.
        placeholders: Tensors that the original has besides, and that sampling does not read, for given weights.
    """

    stacks: Mapping[str, Stack] = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)
    keeps_others: bool = False
    placeholders: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = lambda _: {}

    def layers(self, names: Iterable[str]) -> dict[str, Place]:
        """Places of the layers of these names; those that the original lacks are left out."""
        names = list(names)
        last = self._last_blocks(names)
        places = {name: self._find(name, last) or (Place(name) if self.keeps_others else None) for name in names}
        return {name: place for name, place in places.items() if place}

    def parameters(self, names: Iterable[str]) -> dict[str, Place]:
        """Places of parameters and buffers, such as `proj_out.bias`; those that the original lacks are left out."""
        names = list(names)
        last = self._last_blocks(names)
        places: dict[str, Place] = {}
        for name in names:
            layer, _, attribute = name.rpartition(".")
            if place := self._find(name, last):
                places[name] = place
            elif place := self._find(layer, last):
                places[name] = place._replace(name=f"{place.name}.{place.weight if attribute == 'weight' else attribute}")
            elif self.keeps_others:
                places[name] = Place(name)
        return places

    def _last_blocks(self, names: Iterable[str]) -> dict[str, int]:
        last: dict[str, int] = {}
        for name in names:
            stack, number, _ = _split(name)
            if stack in self.stacks:
                last[stack] = max(last.get(stack, 0), int(number))
        return last

    def _find(self, name: str, last: Mapping[str, int]) -> Place | None:
        stack_name, number, inner = _split(name)
        if stack_name not in self.stacks:
            return self.places.get(name)
        stack = self.stacks[stack_name]
        special = stack.last.get(inner) if int(number) == last[stack_name] else None
        place = special or stack.places.get(inner)
        return place and place._replace(name=f"{stack.name}.{number}.{place.name}")


def swap_halves(value: Tensor) -> Tensor:
    """Exchange the two halves of the first dimension."""
    return torch.cat(value.chunk(2)[::-1])


def _split(name: str) -> tuple[str, str, str]:
    """List of blocks, number of the block, and name within it; for other names without meaning."""
    stack, _, rest = name.partition(".")
    number, _, inner = rest.partition(".")
    return stack, number, inner
