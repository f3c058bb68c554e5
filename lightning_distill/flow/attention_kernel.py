"""Derivative of attention by the Triton kernel of `jvp_flash_attention` (MIT), an optional package for CUDA.

The kernel does not check its input. Its results are silently wrong if the number of keys differs from that of queries, or if
the length is no multiple of 32. `unsupported_reason` therefore filters the input, and `kernel_tangent` pads the length.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DEVICE = "cuda"
DTYPES = (torch.bfloat16, torch.float16)
"""Supported dtypes. In float32 the kernel multiplies in TF32, which is less precise than a float32 run expects."""
HEAD_DIMS = (32, 64, 128, 256)
MULTIPLE = 32


def unsupported_reason(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, dtype: torch.dtype
) -> str | None:
    """Return the reason why the kernel cannot differentiate an attention, or None if it can.

    Args:
        query: (B, H, N, d).
        key: (B, H, M, d).
        value: (B, H, M, d).
        mask: Mask as in `dual_rules.attention_tangent`, or None.
        is_causal: Whether query i attends to keys up to i only.
        dtype: dtype of the attention's result: that of its inputs, or that of autocast.
    """
    if query.device.type != DEVICE:
        return f"on {query.device.type}"
    if not _installed():
        return "jvp_flash_attention is not installed"
    if dtype not in DTYPES:
        return f"in {str(dtype).removeprefix('torch.')}"
    if not query.shape == key.shape == value.shape or query.ndim != 4:
        return "queries, keys and values differ in shape"
    if query.shape[-1] not in HEAD_DIMS:
        return f"head width {query.shape[-1]}"
    if mask is not None and (mask.dtype != torch.bool or is_causal):
        return "an additive mask, or a mask combined with is_causal"
    return None


def kernel_tangent(
    values: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the derivative of softmax attention, for inputs that `unsupported_reason` accepts.

    The kernel needs a mask of B H N^2 bytes if a mask is given, or if N is no multiple of 32. Otherwise memory grows with N.

    Args:
        values: Queries, keys and values, (B, H, N, d) each.
        tangents: Derivatives of the values; None means 0.
        mask: Boolean mask, true where a query attends to a key, broadcastable to (B, H, N, N), or None.
        is_causal: Whether query i attends to keys up to i only.
        scale: Factor of the logits; None means `d ** -0.5`.
        dtype: dtype of the computation.

    Returns:
        Derivative, (B, H, N, d).
    """
    batch, heads, length, _ = values[0].shape
    padding = -length % MULTIPLE
    has_keys = None if mask is None else mask.any(-1, keepdim=True)
    if mask is not None and has_keys is not None:
        mask = mask | ~has_keys  # a softmax over no keys is NaN; torch's attention over no keys is 0
    mask = _padded_mask(mask, (batch, heads, length), padding, values[0].device, is_causal)

    def pad(x: Tensor) -> Tensor:
        return F.pad(x.to(dtype), (0, 0, 0, padding)).contiguous()

    derivatives = [
        pad(torch.zeros_like(x) if tangent is None else tangent) for x, tangent in zip(values, tangents, strict=True)
    ]
    _, (result, *_) = _kernel()(*map(pad, values), *derivatives, mask, 0.0, is_causal, scale, verify_attn_mask=False)
    derivative: Tensor = result[..., :length, :]
    return derivative if has_keys is None else derivative.masked_fill(~has_keys, 0)


def _padded_mask(
    mask: Tensor | None, shape: tuple[int, int, int], padding: int, device: torch.device, is_causal: bool
) -> Tensor | None:
    batch, heads, length = shape
    if mask is None and (padding == 0 or is_causal):  # in causal attention, only padded queries attend to padded keys
        return None
    padded = torch.zeros(batch, heads, length + padding, length + padding, dtype=torch.bool, device=device)
    padded[..., :length] = True  # also for padded queries
    if mask is not None:
        padded[..., :length, :length] = mask
    return padded


@functools.cache  # called for every attention
def _installed() -> bool:
    return importlib.util.find_spec("jvp_flash_attention") is not None


@functools.cache
def _kernel() -> Callable[..., Any]:
    forward: Callable[..., Any] = importlib.import_module("jvp_flash_attention.jvp_attention").JVPAttn.forward
    return forward
