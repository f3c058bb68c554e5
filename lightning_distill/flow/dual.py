"""Forward-mode rules beside autograd: values keep their graph, derivatives have none, and what is expensive has a cheap rule.

Within `torch.autograd.forward_ad.dual_level`, autograd would record the graph of the derivative too, at several times the
memory; torch's own rules take one product too many in a linear layer, and have none for fused attention. `DualNumbers` stands
between the network and torch. Linear operations pass: a derivative without a graph stays without one. Others are called with a
graph for the value, and without one for the derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

# torch leaves these without types
_make_dual: Callable[[Tensor, Tensor], Tensor] = forward_ad.make_dual
_unpack_dual: Callable[[Tensor], tuple[Tensor, Tensor | None]] = forward_ad.unpack_dual

ATTENTION_BLOCK_BYTES = 8 * 2**20
"""Of a block of attention weights in `attention_tangent`; some four are alive at a time."""


class Dual:
    """A value, with its graph, and its derivative of the same shape; None is a derivative of 0."""

    __slots__ = ("tangent", "value")

    def __init__(self, value: Tensor, tangent: Tensor | None) -> None:
        self.value = value
        self.tangent = tangent


def unpack(x: Tensor) -> Dual:
    """The parts of a tensor within a dual level."""
    return Dual(*_unpack_dual(x)) if x.is_floating_point() else Dual(x, None)


def pack(value: Tensor, tangent: Tensor | None) -> Tensor:
    """A tensor of two parts; the tangent takes the value's dtype, and its shape where it can be broadcast to it."""
    return value if tangent is None else _make_dual(value, tangent.to(value.dtype).expand_as(value))


class DualNumbers(TorchFunctionMode):
    """Calls each operation on dual numbers by its rule, once for the value and once for the derivative.

    To be entered within a `dual_level`. Results are dual numbers of torch's own, so what is not seen here (autograd functions,
    in-place operations) is still derived by torch, with a graph of the derivative at worst.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Apply the rule of `func` where one of its inputs has a derivative."""
        kwargs = kwargs or {}
        if _passes(func):
            return func(*args, **kwargs)
        found: list[Dual] = []
        dual_args, dual_kwargs = _unpacked(args, found), _unpacked(kwargs, found)
        if all(dual.tangent is None for dual in found):
            return func(*args, **kwargs)
        value_args, value_kwargs = _values(dual_args), _values(dual_kwargs)
        if _changes_its_input(func, kwargs):
            if dual_args[0].tangent is not None:
                _change(func, dual_args, dual_kwargs)
                func(*value_args, **value_kwargs)
                return args[0]
            return func(*args, **kwargs)
        if func in _RANDOM and torch.is_grad_enabled():
            with _same_random_numbers():
                derived = _by_torch(func, dual_args, dual_kwargs)
            return _merged(func(*value_args, **value_kwargs), derived)
        if (rule := _RULES.get(func)) is not None:
            value = func(*value_args, **value_kwargs)
            with torch.no_grad():
                tangent = rule(value, *dual_args, **dual_kwargs)
            return pack(value, tangent)
        derived = _by_torch(func, dual_args, dual_kwargs)
        return _merged(func(*value_args, **value_kwargs), derived) if torch.is_grad_enabled() else derived


# Rules: the derivative of `out = func(...)`, where the tensors among the arguments are `Dual`


def _linear(out: Tensor, /, input: Dual, weight: Dual, bias: Dual | None = None) -> Tensor:
    terms = []
    if input.tangent is not None:
        terms.append(F.linear(input.tangent, weight.value))
    if weight.tangent is not None:
        terms.append(F.linear(input.value, weight.tangent))
    if bias is not None and bias.tangent is not None:
        terms.append(bias.tangent)
    return _total(terms)


def _matmul(out: Tensor, /, input: Dual, other: Dual) -> Tensor:
    terms = []
    if input.tangent is not None:
        terms.append(torch.matmul(input.tangent, other.value))
    if other.tangent is not None:
        terms.append(torch.matmul(input.value, other.tangent))
    return _total(terms)


def _mul(out: Tensor, /, input: Dual, other: Any) -> Tensor:
    if not isinstance(other, Dual):
        return _tangent(input) * other
    if other.tangent is None:
        return _tangent(input) * other.value
    product = input.value * other.tangent
    return product if input.tangent is None else product + input.tangent * other.value


def _div(out: Tensor, /, input: Dual, other: Any) -> Tensor:
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
    x, tangent = input.value.float(), _tangent(input).float()
    dims = list(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.value.dtype).eps if eps is None else eps
    rstd = torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    normal = x * rstd
    tangent = rstd * (tangent - normal * (normal * tangent).mean(dims, keepdim=True))
    return tangent if weight is None else tangent * weight.value


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
        raise RuntimeError("an attention mask that depends on time has no derivative rule")
    if enable_gqa:
        groups = query.value.shape[-3] // key.value.shape[-3]
        key, value = (
            Dual(*(None if part is None else part.repeat_interleave(groups, -3) for part in (dual.value, dual.tangent)))  # type: ignore[arg-type]
            for dual in (key, value)
        )
    return attention_tangent(query, key, value, out, None if attn_mask is None else attn_mask.value, is_causal, scale)


def attention_tangent(
    query: Dual, key: Dual, value: Dual, out: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    r"""Derivative of softmax attention, a block of queries at a time: memory grows with the sequence, not with its square.

    With the weights :math:`p` and the derivative of their logits :math:`\dot s`, it is
    :math:`(p \dot s) v - \mathrm{rowsum}(p \dot s) \, out + p \dot v`. Softmax and sums are in float32 or above.

    Args:
        query: (..., N, d).
        key: (..., M, d).
        value: (..., M, e).
        out: The attention's value, (..., N, e).
        mask: Of booleans, true where attended, or added to the logits; broadcast to (..., N, M).
        is_causal: Whether query i sees keys up to i only.
        scale: Of the logits; None is `d ** -0.5`.

    Returns:
        (..., N, e), of the dtype of `out`.
    """
    q, k, v = query.value, key.value, value.value
    n, m = q.shape[-2], k.shape[-2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = max(1, ATTENTION_BLOCK_BYTES // (q.shape[:-2].numel() * m * wide.itemsize))
    result = torch.empty_like(out)
    for start in range(0, n, rows):
        block = slice(start, min(start + rows, n))
        logits = (q[..., block, :] @ k.mT).to(wide) * scale
        if is_causal:
            seen = torch.arange(m, device=q.device) <= torch.arange(block.start, block.stop, device=q.device)[:, None]
            logits = logits.masked_fill_(~seen, float("-inf"))
        if mask is not None:
            part = mask[..., block, :] if mask.shape[-2] > 1 else mask
            logits = logits.masked_fill_(~part, float("-inf")) if part.dtype == torch.bool else logits.add_(part)
        weights = torch.softmax(logits, -1)
        terms = []
        if query.tangent is not None or key.tangent is not None:
            products = []
            if query.tangent is not None:
                products.append(query.tangent[..., block, :] @ k.mT)
            if key.tangent is not None:
                products.append(q[..., block, :] @ key.tangent.mT)
            change = _total(products).to(wide).mul_(scale).mul_(weights)
            terms.append((change.to(v.dtype) @ v).to(wide))
            terms.append(change.sum(-1, keepdim=True).neg_() * out[..., block, :])
        if value.tangent is not None:
            terms.append((weights.to(v.dtype) @ value.tangent).to(wide))
        result[..., block, :] = _total(terms)
    return result


def _softmax(out: Tensor, /, input: Dual, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
    change = out * _tangent(input)
    assert dim is not None
    return change - out * change.sum(dim, keepdim=True)


# Parts


def _tangent(x: Dual) -> Tensor:
    return torch.zeros_like(x.value) if x.tangent is None else x.tangent


def _total(terms: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def _passes(func: Any) -> bool:
    return func in _LINEAR or func.__name__ in _TORCHS_OWN


def _changes_its_input(func: Any, kwargs: dict[str, Any]) -> bool:
    name = func.__name__
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or bool(kwargs.get("inplace"))


def _unpacked(tree: Any, found: list[Dual]) -> Any:
    """The arguments with `Dual` in place of tensors, which are also listed."""
    if isinstance(tree, Tensor):
        dual = unpack(tree)
        found.append(dual)
        return dual
    if type(tree) in (tuple, list):
        return type(tree)(_unpacked(item, found) for item in tree)
    if type(tree) is dict:
        return {name: _unpacked(item, found) for name, item in tree.items()}
    return tree


def _values(tree: Any, change: Callable[[Dual], Tensor] = lambda dual: dual.value) -> Any:
    """The arguments with tensors in place of `Dual`."""
    if isinstance(tree, Dual):
        return change(tree)
    if type(tree) in (tuple, list):
        return type(tree)(_values(item, change) for item in tree)
    if type(tree) is dict:
        return {name: _values(item, change) for name, item in tree.items()}
    return tree


def _by_torch(func: Any, args: Any, kwargs: Any) -> Any:
    """The result by torch's own rule, without a graph."""

    def packed(dual: Dual) -> Tensor:
        return pack(dual.value.detach(), None if dual.tangent is None else dual.tangent.detach())

    with torch.no_grad():
        return func(*_values(args, packed), **_values(kwargs, packed))


@torch.no_grad()
def _change(func: Any, args: Any, kwargs: Any) -> None:
    """The derivative of an operation that changes its first input, in its place; the value stays."""
    tangent = args[0].tangent
    copy = Dual(args[0].value.clone(), tangent.clone())

    def packed(dual: Dual) -> Tensor:
        return pack(dual.value.detach(), None if dual.tangent is None else dual.tangent.detach())

    first = packed(copy)
    func(first, *_values(args[1:], packed), **_values(kwargs, packed))
    tangent.copy_(unpack(first).tangent)


def _merged(values: Any, derived: Any) -> Any:
    """Values with their graph and the derivatives of the same results."""
    if isinstance(values, Tensor):
        return pack(values, unpack(derived).tangent)
    if isinstance(values, (tuple, list)):  # also of torch's named results, which are made from one sequence
        return type(values)([_merged(*pair) for pair in zip(values, derived, strict=True)])
    return values


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """What is drawn within is drawn again afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield


def _found(*names: str) -> set[Any]:
    owners = (torch, Tensor, F, torch._C._nn, torch.special)
    return {getattr(owner, name) for name in names for owner in owners if hasattr(owner, name)}


_NAMES: dict[Callable[..., Tensor], tuple[str, ...]] = {
    _linear: ("linear",),
    _matmul: ("matmul", "mm", "bmm", "__matmul__"),
    _mul: ("mul", "multiply", "__mul__", "__rmul__"),
    _div: ("__truediv__",),
    _gelu: ("gelu",),
    _silu: ("silu",),
    _layer_norm: ("layer_norm",),
    _rms_norm: ("rms_norm",),
    _attention: ("scaled_dot_product_attention",),
}
_RULES = {func: rule for rule, names in _NAMES.items() for func in _found(*names)}
_RULES |= dict.fromkeys((F.softmax, Tensor.softmax, torch.softmax), _softmax)
_RANDOM = _found("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout")
_TORCHS_OWN = ("__get__", "_make_dual", "_unpack_dual", "register_hook", "retain_grad", "requires_grad_")
_LINEAR = _found(
    *("add", "sub", "subtract", "neg", "rsub", "__rsub__", "sum", "mean", "cat", "concat", "stack", "chunk", "split", "unbind"),
    *(
        "tensor_split",
        "split_with_sizes",
        "reshape",
        "view",
        "view_as",
        "flatten",
        "unflatten",
        "transpose",
        "permute",
        "movedim",
    ),
    *("swapaxes", "t", "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "repeat_interleave", "tile", "roll", "flip"),
    *("contiguous", "clone", "to", "type_as", "float", "double", "half", "bfloat16", "detach", "__getitem__", "index_select"),
    *("narrow", "select", "gather", "take_along_dim", "where", "masked_fill", "pad", "tril", "triu", "cumsum"),
    *(
        "size",
        "dim",
        "numel",
        "stride",
        "is_floating_point",
        "is_contiguous",
        "zeros_like",
        "ones_like",
        "empty_like",
        "new_zeros",
    ),
)
"""Operations without a product of two inputs: torch's own derivative of them has no graph and costs no more than they do."""
