"""What a transformer holds between its blocks: the features that discriminators look at."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

TRUNK = ("transformer_blocks", "single_transformer_blocks", "layers")
"""Lists of blocks that tokens pass one after the other, as diffusers names them; refiners before them are none."""


def trunk(network: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer of diffusers, from the first to the last."""
    lists = [getattr(network, name, None) for name in TRUNK]
    return [block for listed in lists if isinstance(listed, nn.ModuleList) for block in listed]


def trunk_width(config: Mapping[str, Any]) -> int:
    """Width of the tokens in those blocks, of a transformer's configuration."""
    width: int = config.get("dim") or config["num_attention_heads"] * config["attention_head_dim"]
    return width


def evenly_spaced_layers(depth: int, count: int = 4) -> tuple[int, ...]:
    """The last of `depth` blocks and others before it, evenly spaced, `count` of them where there are so many."""
    return tuple(sorted({round(i * (depth - 1) / count) for i in range(1, count + 1)} - {0})) or (0,)


@contextmanager
def entering(network: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """A context in which a network's forward notes the tokens (B, N, D) that enter some of its blocks, with their graph.

    What enters is noted, not what leaves: all families hand image tokens in first, and return them in orders of their own.

    Args:
        network: Of `trunk`.
        layers: Places of blocks in it.
    """
    blocks, found = trunk(network), dict[int, Tensor]()

    def note(layer: int) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[layer] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return hook

    handles = [blocks[layer].register_forward_pre_hook(note(layer), with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
