"""Derivative rules of single operations, for `dual.DualNumbers`.

A rule takes the value of the operation and its arguments, with `Dual` in place of tensors. It returns the derivative of the
value. Rules run without gradients. PyTorch differentiates operations that have no rule here.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.flow.attention_kernel import kernel_tangent, unsupported_reason

CPU_BLOCK_BYTES = 2 * 2**20
"""Size of an attention-weight block in `attention_tangent` on a CPU: that of its caches. About four are alive at a time."""
DEVICE_BLOCK_BYTES = 64 * 2**20
"""Size of a block on other devices, where every block costs a few launches."""


class Dual:
    """A value, with its graph, and its derivative of the same shape; None means a derivative of 0."""

    __slots__ = ("tangent", "value")

    def __init__(self, value: Tensor, tangent: Tensor | None) -> None:
        self.value = value
        self.tangent = tangent


def _linear(out: Tensor, /, input: Dual, weight: Dual, bias: Dual | None = None) -> Tensor:
    terms = []
    if input.tangent is not None:
        terms.append(F.linear(input.tangent, weight.value))
    if weight.tangent is not None:
        terms.append(F.linear(input.value, weight.tangent))
    if bias is not None and bias.tangent is not None:
        terms.append(bias.tangent)
    return _sum(terms)


def _matmul(out: Tensor, /, input: Dual, other: Dual) -> Tensor:
    terms = []
    if input.tangent is not None:
        terms.append(torch.matmul(input.tangent, other.value))
    if other.tangent is not None:
        terms.append(torch.matmul(input.value, other.tangent))
    return _sum(terms)


def _mul(out: Tensor, /, input: Dual, other: Any) -> Tensor:
    if not isinstance(other, Dual):
        return _tangent(input) * other
    if other.tangent is None:
        return _tangent(input) * other.value
    product = input.value * other.tangent
    return product if input.tangent is None else product + input.tangent * other.value


def _div(out: Tensor, /, input: Dual, other: Any, *, rounding_mode: str | None = None) -> Tensor:
    if rounding_mode is not None:
        return torch.zeros_like(out)
    if not isinstance(other, Dual):
        return _tangent(input) / other
    if other.tangent is None:
        return _tangent(input) / other.value
    numerator = -out * other.tangent
    return (numerator if input.tangent is None else numerator + input.tangent) / other.value


def _gelu(out: Tensor, /, input: Dual, approximate: str = "none") -> Tensor:
    derivative: Tensor = torch.ops.aten.gelu_backward(_tangent(input), input.value, approximate=approximate)
    return derivative


def _silu(out: Tensor, /, input: Dual, inplace: bool = False) -> Tensor:
    derivative: Tensor = torch.ops.aten.silu_backward(_tangent(input), input.value)
    return derivative


def _layer_norm(
    out: Tensor, /, input: Dual, normalized_shape: Any, weight: Dual | None = None, bias: Dual | None = None, eps: float = 1e-5
) -> Tensor:
    # The Jacobian of the normalisation is symmetric, so torch's fused backward is its derivative as well.
    shape = list(normalized_shape)
    _, mean, rstd = torch.native_layer_norm(input.value, shape, None, None, eps)
    tangent: Tensor = torch.ops.aten.native_layer_norm_backward(
        _tangent(input).to(input.value.dtype), input.value, shape, mean, rstd, None, None, [True, False, False]
    )[0]
    return tangent if weight is None else tangent * weight.value


def _rms_norm(
    out: Tensor, /, input: Dual, normalized_shape: Any, weight: Dual | None = None, eps: float | None = None
) -> Tensor:
    wide = torch.promote_types(input.value.dtype, torch.float32)
    x, tangent = input.value.to(wide), _tangent(input).to(wide)
    dims = list(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.value.dtype).eps if eps is None else eps
    rstd = torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    normal = x * rstd
    tangent = rstd * (tangent - normal * (normal * tangent).mean(dims, keepdim=True))
    return tangent if weight is None else tangent * weight.value


def _group_norm(
    out: Tensor, /, input: Dual, num_groups: int, weight: Dual | None = None, bias: Dual | None = None, eps: float = 1e-5
) -> Tensor:
    # torch's own rule fails if a channel is not contiguous, such as in tokens that are reshaped to an image.
    shape = input.value.shape
    value, tangent = (part.reshape(shape[0], num_groups, -1) for part in (input.value, _tangent(input)))
    tangent = _layer_norm(out, Dual(value, tangent), value.shape[-1:], eps=eps).reshape(shape)
    return tangent if weight is None else tangent * weight.value.reshape(-1, *[1] * (len(shape) - 2))


def _attention(
    out: Tensor,
    /,
    query: Dual,
    key: Dual,
    value: Dual,
    attn_mask: Dual | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p > 0:
        raise RuntimeError("attention with dropout has no derivative rule; set the attention's dropout to 0")
    if attn_mask is not None and attn_mask.tangent is not None:
        raise RuntimeError("an attention mask that depends on time has no derivative rule; use a constant mask")
    if enable_gqa:
        groups = query.value.shape[-3] // key.value.shape[-3]
        key, value = (
            Dual(*(None if part is None else part.repeat_interleave(groups, -3) for part in (dual.value, dual.tangent)))  # type: ignore[arg-type]
            for dual in (key, value)
        )
    mask, values = None if attn_mask is None else attn_mask.value, (query.value, key.value, value.value)
    if unsupported_reason(*values, mask, is_causal, out.dtype) is None:
        tangents = query.tangent, key.tangent, value.tangent
        return kernel_tangent(values, tangents, mask, is_causal, scale, out.dtype)
    return attention_tangent(query, key, value, out, mask, is_causal, scale)


def attention_tangent(
    query: Dual, key: Dual, value: Dual, out: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    r"""Derivative of softmax attention in blocks of a head's queries: memory grows with the sequence length, not its square.

    With the weights :math:`p` and the derivative of their logits :math:`\dot s`, it is
    :math:`(p \dot s) v - \mathrm{rowsum}(p \dot s) \, out + p \dot v`. Softmax and sums are in float32 or above.

    Args:
        query: (..., N, d).
        key: (..., M, d).
        value: (..., M, e).
        out: Value of the attention, (..., N, e).
        mask: Boolean mask, true where a query attends to a key, or a mask that is added to the logits. Broadcastable to
            (..., N, M).
        is_causal: Whether query i attends to keys up to i only.
        scale: Factor of the logits; None means `d ** -0.5`.

    Returns:
        Derivative, (..., N, e), with the dtype of `out`.
    """
    lead, n, m = out.shape[:-2] or torch.Size((1,)), out.shape[-2], key.value.shape[-2]
    q, k, v, values = (_heads(part, lead) for part in (query.value, key.value, value.value, out))
    dq, dk, dv = (None if dual.tangent is None else _heads(dual.tangent, lead) for dual in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(out.dtype, torch.float32)
    # The derivative of the logits is a single product of twice the width.
    pairs = [(x, y) for x, y in ((dq, k), (q, dk)) if x is not None and y is not None]
    left, right = (torch.cat(side, -1) for side in zip(*pairs, strict=True)) if pairs else (None, None)
    block_bytes = CPU_BLOCK_BYTES if out.device.type == "cpu" else DEVICE_BLOCK_BYTES
    rows = min(n, max(1, block_bytes // (m * wide.itemsize)))
    heads = max(1, block_bytes // (m * wide.itemsize * rows)) if rows == n else 1
    result = torch.empty_like(values)
    for head, row in itertools.product(range(0, len(q), heads), range(0, n, rows)):
        h, i = slice(head, head + heads), slice(row, row + rows)
        logits = _product(q[h, i], k[h], scale).to(wide)
        if is_causal:
            hidden = torch.arange(m, device=out.device) > torch.arange(n, device=out.device)[i, None]
            logits.masked_fill_(hidden, float("-inf"))
        part = None if mask is None else _rows_of_heads(mask, lead, h, i)
        if part is not None:
            logits = logits.masked_fill_(~part, float("-inf")) if part.dtype == torch.bool else logits.add_(part)
        weights = torch.softmax(logits, -1)
        if part is not None:  # attention over no keys is 0
            weights.masked_fill_(logits.amax(-1, keepdim=True) == float("-inf"), 0)
        terms = []
        if left is not None and right is not None:
            change = _product(left[h, i], right[h], scale).to(wide).mul_(weights)
            terms.append((change.to(v.dtype) @ v[h]).to(wide))
            terms.append(change.sum(-1, keepdim=True).neg_() * values[h, i])
        if dv is not None:
            terms.append((weights.to(v.dtype) @ dv[h]).to(wide))
        result[h, i] = _sum(terms)
    return result.view(out.shape)


def _heads(x: Tensor, lead: torch.Size) -> Tensor:
    """Flatten the leading dimensions to one batch of heads, (heads, N, d)."""
    return x.expand(*lead, *x.shape[-2:]).flatten(0, -3)


def _product(rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Compute `scale * rows @ columns.mT` of two batches of matrices, scaled before rounding."""
    return torch.baddbmm(rows.new_empty(()), rows, columns.mT, beta=0, alpha=scale)


def _rows_of_heads(mask: Tensor, lead: torch.Size, heads: slice, rows: slice) -> Tensor:
    """Slice a mask for some rows of some flattened heads, without expanding the full mask to every head."""
    part = mask[..., rows, :] if mask.shape[-2] > 1 else mask
    index = torch.unravel_index(torch.arange(lead.numel(), device=mask.device)[heads], lead)
    return part.expand(*lead, *part.shape[-2:])[index]


def _softmax(out: Tensor, /, input: Dual, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
    change = out * _tangent(input)
    assert dim is not None
    return change - out * change.sum(dim, keepdim=True)


def _tangent(x: Dual) -> Tensor:
    return torch.zeros_like(x.value) if x.tangent is None else x.tangent


def _sum(terms: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def _functions_named(*names: str) -> set[Any]:
    """Return the functions and methods with these space-separated names."""
    owners = (torch, Tensor, F, torch._C._nn, torch.special)
    return {getattr(owner, name) for name in " ".join(names).split() for owner in owners if hasattr(owner, name)}


_NAMES: dict[Callable[..., Tensor], tuple[str, ...]] = {
    _linear: ("linear",),
    _matmul: ("matmul", "mm", "bmm", "__matmul__"),
    _mul: ("mul", "multiply", "__mul__", "__rmul__"),
    _div: ("div", "divide", "true_divide", "__truediv__"),
    _gelu: ("gelu",),
    _silu: ("silu",),
    _layer_norm: ("layer_norm",),
    _rms_norm: ("rms_norm",),
    _group_norm: ("group_norm",),
    _attention: ("scaled_dot_product_attention",),
}
RULES = {func: rule for rule, names in _NAMES.items() for func in _functions_named(*names)}
RULES |= dict.fromkeys((F.softmax, Tensor.softmax, torch.softmax), _softmax)
RANDOM = _functions_named("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout")
LINEAR = _functions_named(
    "add sub subtract neg rsub __rsub__ sum mean cumsum cat concat stack chunk split split_with_sizes tensor_split unbind",
    "reshape view view_as flatten unflatten transpose permute movedim swapaxes t squeeze unsqueeze expand expand_as",
    "repeat repeat_interleave tile roll flip pad tril triu narrow select index_select gather take_along_dim where",
    "masked_fill view_as_complex view_as_real contiguous clone detach to type_as float double half bfloat16 __getitem__",
    "size dim numel stride is_floating_point is_contiguous zeros_like ones_like empty_like new_zeros",
)
"""Operations without a product of two inputs. torch's derivatives of them have no graph and cost no more."""
