"""Forward mode beside autograd: values keep their graph, derivatives have none, and what is expensive has a cheap rule.

Within `torch.autograd.forward_ad.dual_level`, autograd would record the graph of the derivative too, at several times the
memory; torch's own rules take one product too many in a linear layer, and have none for fused attention. `DualNumbers` stands
between the network and torch. Linear operations pass: a derivative without a graph stays without one. Others are called with a
graph for the value, and without one for the derivative.
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

# torch leaves these without types
_make_dual: Callable[[Tensor, Tensor], Tensor] = forward_ad.make_dual
_unpack_dual: Callable[[Tensor], tuple[Tensor, Tensor | None]] = forward_ad.unpack_dual
_top_hooks: Callable[[bool], tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None] = (
    torch._C._autograd._top_saved_tensors_default_hooks
)

_TORCHS_OWN = ("__get__", "_make_dual", "_unpack_dual", "register_hook", "retain_grad", "requires_grad_")
"""No operations on values: attributes, hooks and the dual numbers themselves."""


def unpack(x: Tensor) -> Dual:
    """The parts of a tensor within a dual level."""
    return Dual(*_unpack_dual(x)) if x.is_floating_point() or x.is_complex() else Dual(x, None)


def pack(value: Tensor, tangent: Tensor | None) -> Tensor:
    """A tensor of two parts; the tangent takes the value's dtype, and its shape where it can be broadcast to it."""
    if tangent is None:
        return value
    if tangent.shape != value.shape:
        tangent = tangent.expand_as(value).clone()  # entries of their own: operations in place write to them
    return _make_dual(value, tangent.to(value.dtype))


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
        if func in RANDOM and torch.is_grad_enabled():
            with same_random_numbers():
                derived = _by_torch(func, dual_args, dual_kwargs)
            return _merged(func(*value_args, **value_kwargs), derived)
        if (rule := RULES.get(func)) is not None:
            value = func(*value_args, **value_kwargs)
            with torch.no_grad():
                tangent = rule(value, *dual_args, **dual_kwargs)
            return pack(value, tangent)
        derived = _by_torch(func, dual_args, dual_kwargs)
        return _merged(func(*value_args, **value_kwargs), derived) if torch.is_grad_enabled() else derived


def _passes(func: Any) -> bool:
    return func in LINEAR or func.__name__ in _TORCHS_OWN


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
    with torch.no_grad():
        return func(*_values(args, _without_graph), **_values(kwargs, _without_graph))


@torch.no_grad()
def _change(func: Any, args: Any, kwargs: Any) -> None:
    """The derivative of an operation that changes its first input, in its place; the value stays."""
    tangent = args[0].tangent
    first = pack(args[0].value.clone(), tangent.clone())
    func(first, *_values(args[1:], _without_graph), **_values(kwargs, _without_graph))
    tangent.copy_(unpack(first).tangent)


def _without_graph(dual: Dual) -> Tensor:
    return pack(dual.value.detach(), None if dual.tangent is None else dual.tangent.detach())


def _merged(values: Any, derived: Any) -> Any:
    """Values with their graph and the derivatives of the same results."""
    if isinstance(values, Tensor):
        return pack(values, unpack(derived).tangent)
    if isinstance(values, (tuple, list)):  # also of torch's named results, which are made from one sequence
        return type(values)([_merged(*pair) for pair in zip(values, derived, strict=True)])
    return values


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """What is drawn within is drawn again afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield


@contextmanager
def saved_without_tangents() -> Iterator[None]:
    """What the backward pass needs is kept as plain values.

    The value of a dual number is a view of it, so autograd, which saves values, would keep every derivative alive until the end
    of the pass. Leaves are saved as they are: sharded strategies exchange the data of parameters in between. Hooks around this
    one, as of `torch.autograd.graph.save_on_cpu`, see what is kept.
    """
    keep, give = _top_hooks(False) or (_same, _same)

    def save(x: Tensor) -> tuple[Any, Tensor | None, int]:
        value = x if x.is_leaf else x.detach()
        return keep(value), None if x.is_leaf or keep is not _same else value, value._version

    def load(saved: tuple[Any, Tensor | None, int]) -> Tensor:
        kept, value, version = saved
        if value is not None and value._version != version:  # autograd does not look where hooks do
            raise RuntimeError("a value that the backward pass needs was changed in place; compute the change out of place")
        return give(kept)

    with torch.autograd.graph.saved_tensors_hooks(save, load):
        yield


def _same(x: Any) -> Any:
    return x
