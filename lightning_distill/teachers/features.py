"""Features for discriminators: the tokens between the blocks of a transformer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

TRUNK = ("transformer_blocks", "single_transformer_blocks", "layers")
"""Names of block lists in diffusers transformers, in the order of the forward pass; refiner blocks are not included."""


def trunk(network: nn.Module) -> list[nn.Module]:
    """Blocks of a diffusers transformer, from first to last."""
    lists = [getattr(network, name, None) for name in TRUNK]
    return [block for listed in lists if isinstance(listed, nn.ModuleList) for block in listed]


def trunk_width(config: Mapping[str, Any]) -> int:
    """Width of the tokens in the trunk of a transformer, from its configuration."""
    width: int = config.get("dim") or config["num_attention_heads"] * config["attention_head_dim"]
    return width


def evenly_spaced_layers(depth: int, count: int = 4) -> tuple[int, ...]:
    """Indices of `count` evenly spaced blocks that end with the last of `depth`; fewer if `depth` is smaller."""
    return tuple(sorted({round(i * (depth - 1) / count) for i in range(1, count + 1)} - {0})) or (0,)


@contextmanager
def record_block_inputs(network: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Context that records the tokens (B, N, D) that enter the given blocks in a forward pass, with their autograd graph.

    It records inputs, not outputs: image tokens are the first input in all families, but the order of outputs differs.

    Args:
        network: A diffusers transformer.
        layers: Indices of blocks in its trunk.
    """
    blocks, inputs = trunk(network), dict[int, Tensor]()

    def record(layer: int) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[layer] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return hook

    handles = [blocks[layer].register_forward_pre_hook(record(layer), with_kwargs=True) for layer in layers]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
