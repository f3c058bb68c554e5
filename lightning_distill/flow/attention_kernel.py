"""Derivative of attention by the Triton kernel of `jvp_flash_attention` (MIT), an optional package, on CUDA.

The kernel says little about what it cannot do: with keys of another number than queries, or with a length that is no multiple
of 32, its results are wrong without a word. So it is given only what `refusal` lets pass, and lengths are padded.
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
"""In float32 the kernel multiplies in TF32, which is not what a run in float32 asks for."""
HEAD_DIMS = (32, 64, 128, 256)
MULTIPLE = 32


def refusal(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, dtype: torch.dtype) -> str | None:
    """Why the kernel does not derive an attention, or None where it does.

    Args:
        query: (B, H, N, d).
        key: (B, H, M, d).
        value: (B, H, M, d).
        mask: As for `dual_rules.attention_tangent`, or None.
        is_causal: Whether query i sees keys up to i only.
        dtype: Of the attention's result: that of its inputs, or of autocast.
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
        return f"heads of width {query.shape[-1]}"
    if mask is not None and (mask.dtype != torch.bool or is_causal):
        return "a mask that is added, or besides a causal one"
    return None


def kernel_tangent(
    values: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Derivative (B, H, N, d) of softmax attention, for what `refusal` lets pass.

    Where N is no multiple of 32, or with a mask, the kernel needs a mask of B H N^2 bytes; else memory grows with N.

    Args:
        values: Queries, keys and values, (B, H, N, d) each.
        tangents: Their derivatives; None is 0.
        mask: Of booleans, true where attended, broadcast to (B, H, N, N), or None.
        is_causal: Whether query i sees keys up to i only.
        scale: Of the logits; None is `d ** -0.5`.
        dtype: In which to compute.
    """
    batch, heads, length, _ = values[0].shape
    missing = -length % MULTIPLE
    seeing = None if mask is None else mask.any(-1, keepdim=True)
    if mask is not None and seeing is not None:
        mask = mask | ~seeing  # a softmax of nothing is NaN; torch's attention of nothing is 0
    mask = _padded_mask(mask, (batch, heads, length), missing, values[0].device, is_causal)

    def prepared(x: Tensor) -> Tensor:
        return F.pad(x.to(dtype), (0, 0, 0, missing)).contiguous()

    derivatives = [
        prepared(torch.zeros_like(x) if tangent is None else tangent) for x, tangent in zip(values, tangents, strict=True)
    ]
    _, (result, *_) = _kernel()(*map(prepared, values), *derivatives, mask, 0.0, is_causal, scale, verify_attn_mask=False)
    derivative: Tensor = result[..., :length, :]
    return derivative if seeing is None else derivative.masked_fill(~seeing, 0)


def _padded_mask(
    mask: Tensor | None, shape: tuple[int, int, int], missing: int, device: torch.device, is_causal: bool
) -> Tensor | None:
    batch, heads, length = shape
    if mask is None and (missing == 0 or is_causal):  # behind a causal one, added keys are seen by added queries only
        return None
    padded = torch.zeros(batch, heads, length + missing, length + missing, dtype=torch.bool, device=device)
    padded[..., :length] = True  # to added queries too
    if mask is not None:
        padded[..., :length, :length] = mask
    return padded


@functools.cache  # asked for every attention
def _installed() -> bool:
    return importlib.util.find_spec("jvp_flash_attention") is not None


@functools.cache
def _kernel() -> Callable[..., Any]:
    forward: Callable[..., Any] = importlib.import_module("jvp_flash_attention.jvp_attention").JVPAttn.forward
    return forward
