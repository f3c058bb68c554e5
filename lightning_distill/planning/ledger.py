"""Memory of computations that are not done: what tensors without memory would take while they are alive."""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_distill.flow.dual_rules import RULES
from lightning_distill.planning.description import is_fake

Key = int
"""Number of processes that gradients are divided among."""


class Ledger(TorchDispatchMode):
    """Follows the bytes of all tensors that come into being in it.

    Gradients of parameters are counted and dropped as soon as they are there, since sharded strategies divide them; what is
    alive besides and the sum of gradients so far give the peak for any number of processes.

    Args:
        shares: Numbers of processes that gradients may be divided among.

    Attributes:
        live: Bytes alive, without gradients.
        gradients: Bytes of gradients.
        peaks: Most of both, by the number of processes.
    """

    def __init__(self, shares: Sequence[Key]) -> None:
        super().__init__()
        self.live = 0
        self.gradients = 0
        self.peaks = dict.fromkeys(shares, 0.0)
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Count the results."""
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _positions(args[1]), *args[2:])
        result = func(*args, **(kwargs or {}))
        # Views of what was there before, such as weights, and changes of it in place are nothing new.
        old = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in old and storage._cdata not in self._known:
                self._count(storage)
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.note()

    def note(self, bytes_beside: float = 0, divided: bool = False) -> None:
        """Look at what is alive now.

        Args:
            bytes_beside: Of what was not seen here.
            divided: Whether these are divided among processes.
        """
        for share in self.peaks:
            beside = bytes_beside / share if divided else bytes_beside
            self.peaks[share] = max(self.peaks[share], self.live + self.gradients / share + beside)

    def take_gradients(self, parameters: Iterable[nn.Parameter], accumulated: bool = False) -> None:
        """Count the gradients of parameters from now on.

        Args:
            parameters: That train.
            accumulated: Whether there are gradients from before, which those of a step are added to.
        """

        def count(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if accumulated:
                self.note()
            else:
                self.gradients += parameter.grad.nbytes
            parameter.grad = None
            self.note()

        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(count)


def _positions(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with positions in the place of masks, whose number must be known: all of them, if the mask is without memory."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        else:
            mask = torch.ones(index.shape, dtype=torch.bool) if is_fake(index) else index
            found += mask.nonzero().unbind(1)
    return found


def _storages(tree: Any) -> list[Any]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor) and is_fake(x)]


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """What `torch.autocast` does on CUDA and not on a CPU: operations that are sensitive to rounding run in float32.

    They are replaced for the time, since a mode would not see what is run again in a backward pass.
    """
    import torch._decomp.decompositions_for_jvp  # noqa: F401  # torch compiles these at the first dual number, from the originals

    with ExitStack() as stack:
        rules = {}
        for owner, names in _FLOAT32.items():
            for name in names:
                func = getattr(owner, name)
                wide = _in_float32(func)
                stack.enter_context(patch.object(owner, name, wide))
                if func in RULES:
                    rules[wide] = RULES[func]  # functions of torch's in Python call themselves by name
        stack.enter_context(patch.dict(RULES, rules))
        yield


def _in_float32(func: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(func)
    def wide(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tuple(_widened(x) for x in args), {name: _widened(x) for name, x in kwargs.items()}
        return func(*args, **kwargs)

    return wide


def _widened(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


_COMMON = ("softmax", "rsqrt", "pow", "sum", "exp", "log", "reciprocal", "cumsum", "prod")
_FLOAT32: dict[Any, tuple[str, ...]] = {
    F: ("layer_norm", "group_norm", "rms_norm", "softmax", "softplus", "mse_loss"),
    torch: ("layer_norm", "group_norm", "rms_norm", *_COMMON),
    Tensor: ("__pow__", *_COMMON),
}
"""Of torch's list for CUDA (ATen/autocast_mode.h) those that transformers and autoencoders call."""
