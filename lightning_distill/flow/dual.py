"""Forward mode beside autograd: values keep their graph, derivatives have none, and expensive operations have cheap rules.

Within `torch.autograd.forward_ad.dual_level`, autograd would also record the graph of the derivative, at several times the
memory. The rules of PyTorch compute one product too many in a linear layer, and do not cover fused attention.

`DualNumbers` intercepts the network's calls to torch. Linear operations pass through, because a derivative without a graph
stays without one. Other operations run with a graph for the value, and without one for the derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from lightning_distill.flow.dual_rules import LINEAR, RANDOM, RULES, Dual

# torch has no types for these functions.
_make_dual: Callable[[Tensor, Tensor], Tensor] = forward_ad.make_dual
_unpack_dual: Callable[[Tensor], tuple[Tensor, Tensor | None]] = forward_ad.unpack_dual
_top_hooks: Callable[[bool], tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None] = (
    torch._C._autograd._top_saved_tensors_default_hooks
)

_INTERNAL_METHODS = ("__get__", "_make_dual", "_unpack_dual", "register_hook", "retain_grad", "requires_grad_")
"""Methods that do not operate on values: attributes, hooks and the dual numbers themselves."""


def unpack(x: Tensor) -> Dual:
    """Split a tensor of a dual level into its value and its tangent."""
    return Dual(*_unpack_dual(x)) if x.is_floating_point() or x.is_complex() else Dual(x, None)


def pack(value: Tensor, tangent: Tensor | None) -> Tensor:
    """Join a value and a tangent to one tensor; the tangent is cast to the value's dtype and broadcast to its shape."""
    if tangent is None:
        return value
    if tangent.shape != value.shape:
        tangent = tangent.expand_as(value).clone()  # a copy, because in-place operations write to its entries
    return _make_dual(value, tangent.to(value.dtype))


class DualNumbers(TorchFunctionMode):
    """Applies each operation to dual numbers by its rule, once for the value and once for the derivative.

    Enter it within a `dual_level`. Results are dual numbers of PyTorch. PyTorch therefore differentiates operations that bypass
    this mode (autograd functions, in-place operations), at worst with a graph of the derivative.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Apply the rule of `func` if one of its inputs has a tangent."""
        kwargs = kwargs or {}
        if _passes_through(func):
            return func(*args, **kwargs)
        duals: list[Dual] = []
        dual_args, dual_kwargs = _to_duals(args, duals), _to_duals(kwargs, duals)
        if all(dual.tangent is None for dual in duals):
            return func(*args, **kwargs)
        value_args, value_kwargs = _to_tensors(dual_args), _to_tensors(dual_kwargs)
        if _is_in_place(func, kwargs):
            if dual_args[0].tangent is not None:
                _update_tangent(func, dual_args, dual_kwargs)
                func(*value_args, **value_kwargs)
                return args[0]
            return func(*args, **kwargs)
        if func in RANDOM and torch.is_grad_enabled():
            with preserve_rng_state():
                derived = _torch_rule(func, dual_args, dual_kwargs)
            return _attach_tangents(func(*value_args, **value_kwargs), derived)
        if (rule := RULES.get(func)) is not None:
            value = func(*value_args, **value_kwargs)
            with torch.no_grad():
                tangent = rule(value, *dual_args, **dual_kwargs)
            return pack(value, tangent)
        derived = _torch_rule(func, dual_args, dual_kwargs)
        return _attach_tangents(func(*value_args, **value_kwargs), derived) if torch.is_grad_enabled() else derived


def _passes_through(func: Any) -> bool:
    return func in LINEAR or func.__name__ in _INTERNAL_METHODS


def _is_in_place(func: Any, kwargs: dict[str, Any]) -> bool:
    name = func.__name__
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or bool(kwargs.get("inplace"))


def _to_duals(tree: Any, duals: list[Dual]) -> Any:
    """Replace tensors in the arguments by `Dual`, and append each of these to `duals`."""
    if isinstance(tree, Tensor):
        dual = unpack(tree)
        duals.append(dual)
        return dual
    if type(tree) in (tuple, list):
        return type(tree)(_to_duals(item, duals) for item in tree)
    if type(tree) is dict:
        return {name: _to_duals(item, duals) for name, item in tree.items()}
    return tree


def _to_tensors(tree: Any, convert: Callable[[Dual], Tensor] = lambda dual: dual.value) -> Any:
    """Replace each `Dual` in the arguments by a tensor, by default its value."""
    if isinstance(tree, Dual):
        return convert(tree)
    if type(tree) in (tuple, list):
        return type(tree)(_to_tensors(item, convert) for item in tree)
    if type(tree) is dict:
        return {name: _to_tensors(item, convert) for name, item in tree.items()}
    return tree


def _torch_rule(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute the result by torch's own rule, without a graph."""
    with torch.no_grad():
        return func(*_to_tensors(args, _without_graph), **_to_tensors(kwargs, _without_graph))


@torch.no_grad()
def _update_tangent(func: Any, args: Any, kwargs: Any) -> None:
    """Apply an in-place operation to the tangent of its first input; the value stays unchanged."""
    tangent = args[0].tangent
    first = pack(args[0].value.clone(), tangent.clone())
    func(first, *_to_tensors(args[1:], _without_graph), **_to_tensors(kwargs, _without_graph))
    tangent.copy_(unpack(first).tangent)


def _without_graph(dual: Dual) -> Tensor:
    return pack(dual.value.detach(), None if dual.tangent is None else dual.tangent.detach())


def _attach_tangents(values: Any, derived: Any) -> Any:
    """Join the values, with their graph, and the tangents of the same results."""
    if isinstance(values, Tensor):
        return pack(values, unpack(derived).tangent)
    if isinstance(values, (tuple, list)):  # includes torch's named results, whose constructors take one sequence
        return type(values)([_attach_tangents(*pair) for pair in zip(values, derived, strict=True)])
    return values


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the states of the random number generators on exit, so that the same numbers are sampled again."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield


@contextmanager
def saved_without_tangents() -> Iterator[None]:
    """Save tensors for the backward pass as plain values, without tangents.

    The value of a dual number is a view of it. Autograd saves values, and would keep every derivative alive until the end of
    the pass. Leaves are saved unchanged, because sharded strategies exchange the data of parameters between the two passes.
    Enclosing hooks, such as `torch.autograd.graph.save_on_cpu`, receive the plain values.
    """
    outer_pack, outer_unpack = _top_hooks(False) or (_identity, _identity)

    def pack_hook(x: Tensor) -> tuple[Any, Tensor | None, int]:
        value = x if x.is_leaf else x.detach()
        return outer_pack(value), None if x.is_leaf or outer_pack is not _identity else value, value._version

    def unpack_hook(saved: tuple[Any, Tensor | None, int]) -> Tensor:
        packed, value, version = saved
        if value is not None and value._version != version:  # autograd does not check tensors that hooks save
            raise RuntimeError("a tensor saved for the backward pass was changed in place; use an out-of-place operation")
        return outer_unpack(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, unpack_hook):
        yield


def _identity(x: Any) -> Any:
    return x
