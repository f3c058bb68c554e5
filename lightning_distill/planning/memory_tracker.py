"""Peak-memory accounting on fake tensors."""

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
from torch.utils.hooks import RemovableHandle

from lightning_distill.flow.dual_rules import RULES
from lightning_distill.planning.fake_pipeline import is_fake


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all fake tensors that operations inside this mode create.

    Sharded strategies divide gradients over processes. The tracker therefore counts the gradient of a parameter when it is
    complete, and drops it. Other live tensors and the gradients so far give the peak for each number of shards.

    Args:
        shard_counts: Numbers of shards of the gradients.

    Attributes:
        live: Bytes of live tensors, without gradients.
        gradients: Bytes of gradients.
        peaks: Largest sum of both, by the number of shards.
    """

    def __init__(self, shard_counts: Sequence[int]) -> None:
        super().__init__()
        self.live = 0
        self.gradients = 0
        self.peaks = dict.fromkeys(shard_counts, 0.0)
        self._counted: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operation and count its results."""
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _positions(args[1]), *args[2:])
        result = func(*args, **(kwargs or {}))
        # Views of existing tensors, such as weights, and in-place results have no new storage.
        inputs = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in inputs and storage._cdata not in self._counted:
                self._count(storage)
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: Any) -> None:
            del self._counted[key]
            self.live -= size

        self._counted[key] = weakref.ref(storage, freed)
        self.live += size
        self.update_peaks()

    def update_peaks(self, extra_bytes: float = 0, sharded: bool = False) -> None:
        """Update the peaks with the current memory.

        Args:
            extra_bytes: Bytes in addition to those counted here.
            sharded: Whether the extra bytes are divided over the shards.
        """
        for shards in self.peaks:
            extra = extra_bytes / shards if sharded else extra_bytes
            self.peaks[shards] = max(self.peaks[shards], self.live + self.gradients / shards + extra)

    def track_gradients(self, parameters: Iterable[nn.Parameter], accumulated: bool = False) -> list[RemovableHandle]:
        """Count the gradients of parameters until the returned hooks are removed.

        Args:
            parameters: Parameters; frozen ones are ignored.
            accumulated: Whether new gradients are added to existing ones, which `gradients` already counts.
        """

        def count(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if accumulated:
                self.update_peaks()
            else:
                self.gradients += parameter.grad.nbytes
            parameter.grad = None
            self.update_peaks()

        return [parameter.register_post_accumulate_grad_hook(count) for parameter in parameters if parameter.requires_grad]


def _positions(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with positions in place of masks. A fake mask has no values, so it selects all positions."""
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
    """Emulate the float32 list of CUDA's `torch.autocast` on the CPU: operations sensitive to rounding run in float32.

    The functions are patched, because a mode would not see the recomputation of checkpointed blocks in a backward pass.
    """
    # torch compiles these decompositions at the first dual number. That must happen before the functions are patched.
    import torch._decomp.decompositions_for_jvp  # noqa: F401

    with ExitStack() as stack:
        rules = {}
        for owner, names in _FLOAT32.items():
            for name in names:
                func = getattr(owner, name)
                float32_func = _in_float32(func)
                stack.enter_context(patch.object(owner, name, float32_func))
                if func in RULES:
                    rules[float32_func] = RULES[func]  # torch's Python functions look themselves up by name
        stack.enter_context(patch.dict(RULES, rules))
        yield


def _in_float32(func: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tuple(_to_float32(x) for x in args), {name: _to_float32(x) for name, x in kwargs.items()}
        return func(*args, **kwargs)

    return wrapper


def _to_float32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


_COMMON = ("softmax", "rsqrt", "pow", "sum", "exp", "log", "reciprocal", "cumsum", "prod")
_FLOAT32: dict[Any, tuple[str, ...]] = {
    F: ("layer_norm", "group_norm", "rms_norm", "softmax", "softplus", "mse_loss"),
    torch: ("layer_norm", "group_norm", "rms_norm", *_COMMON),
    Tensor: ("__pow__", *_COMMON),
}
"""Functions of torch's float32 list for CUDA (ATen/autocast_mode.h) that transformers and autoencoders call."""
