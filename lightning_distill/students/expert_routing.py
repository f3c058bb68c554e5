"""Mixtures of experts with frozen routing: a later pass sends its tokens to the experts of an earlier pass.

The choice of the k best experts is piecewise constant. Its derivative is therefore that of the routing weights under frozen
routing. Passes that are compared, as in a finite difference in time, must share the routing. If one pass chose other experts,
the difference would contain a discontinuity that no derivative has. A recomputation for the backward pass needs frozen routing
too.

Every exported student contains a copy of this file. It imports only torch, and runs without this package.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_frozen_routing: ContextVar[Routing | None] = ContextVar("frozen routing", default=None)


class Routing:
    """Expert choices of mixtures: made in the first pass under it, and reused in every later pass.

    ::

        routing = Routing()
        with routing:
            first = network(x)
        with routing:
            second = network(x + change)  # with the same experts

    Args:
        outer: Enclosing routing, which chooses for mixtures that this one has no choice for yet.
    """

    def __init__(self, outer: Routing | None = None) -> None:
        self.outer = outer
        self._chosen: dict[nn.Module, Tensor] = {}
        self._entered: list[Token[Routing | None]] = []

    def __enter__(self) -> Routing:
        self._entered.append(_frozen_routing.set(self))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _frozen_routing.reset(self._entered.pop())

    def choose(self, mixture: nn.Module, probabilities: Tensor, count: int) -> Tensor:
        """Experts (N, count) of a mixture's tokens: those chosen before, or the most probable ones.

        Args:
            mixture: Module that contains the experts.
            probabilities: (N, E).
            count: Experts per token.

        Raises:
            RuntimeError: If the experts were chosen for another number of tokens.
        """
        if mixture not in self._chosen:
            self._chosen[mixture] = choose_experts(mixture, probabilities, count, self.outer)
        chosen = self._chosen[mixture]
        if len(chosen) != len(probabilities):
            raise RuntimeError(
                f"the frozen routing has {len(chosen)} tokens, and this pass has {len(probabilities)}; use one Routing per set "
                "of inputs"
            )
        return chosen


def choose_experts(mixture: nn.Module, probabilities: Tensor, count: int, routing: Routing | None) -> Tensor:
    """Experts (N, count) of a mixture by a routing, or the most probable ones without a routing."""
    if routing is not None:
        return routing.choose(mixture, probabilities, count)
    with torch.no_grad():
        return probabilities.topk(count, dim=1).indices


def tokens_per_expert(experts: Tensor, count: int) -> list[int]:
    """Number of tokens of each of `count` experts, from the expert of each of N tokens (N,)."""
    counts: list[int] = experts.bincount(minlength=count).tolist()
    return counts


def checkpointed(block: Callable[..., tuple[Any, ...]], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Call a block under activation checkpointing, with frozen routing in the recomputation.

    Two runs of the same operations may round differently. A token that is close to the border of two experts could change its
    expert. The recomputed activations would then differ from those of the loss.

    Args:
        block: Function that returns a tuple, with hidden states first.
        *args: Positional arguments of the block.
        **kwargs: Keyword arguments of the block.
    """
    if not torch.is_grad_enabled():
        return block(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        hidden_states, *rest = block(*args, **kwargs)
        # This product saves a tensor for the backward pass. The recomputation therefore starts before the backward pass of any
        # module, and ends after the forward pass of all. ZeRO-3 releases a module's weights when its forward pass ends, even if
        # other modules need them.
        return hidden_states * hidden_states.new_ones(()), *rest

    routing = Routing(outer=_frozen_routing.get())
    outputs: tuple[Any, ...] = checkpoint(run, *args, use_reentrant=False, context_fn=lambda: (routing, routing), **kwargs)
    return outputs


class RoutedExperts(nn.Module):
    r"""Replacement of HunyuanImage 3.0's mixture of experts: the same result, with support for frozen routing.

    .. math:: y = S(x) + \sum_{e \in K(x)} \frac{p_e(x)}{\sum_{f \in K(x)} p_f(x)} E_e(x), \quad p = \mathrm{softmax}(W x),

    with the k most probable experts K and the shared expert S, if there is one. Unlike the published implementation, it runs on
    any device and in forward mode.

    Args:
        stock: Mixture to replace; its modules are reused under the same names.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.gate = stock.gate
        self.experts = stock.experts
        self.shared_mlp: nn.Module | None = getattr(stock, "shared_mlp", None)
        self.experts_per_token: int = stock.moe_topk

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Compute hidden states (B, L, D) from hidden states (B, L, D)."""
        tokens, count = hidden_states.reshape(-1, hidden_states.shape[-1]), self.experts_per_token
        with torch.autocast(tokens.device.type, enabled=False):
            probabilities = self.gate.wg(tokens.to(next(self.gate.wg.parameters()).dtype)).softmax(dim=1)
            chosen = choose_experts(self, probabilities, count, _frozen_routing.get())
            weights = probabilities.gather(1, chosen)
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-8)

        experts = chosen.flatten()
        order = experts.argsort(stable=True)
        counts = tokens_per_expert(experts, len(self.experts))
        parts = tokens.index_select(0, order // count).split(counts)
        # Experts without a token run too, because sharded strategies gather weights on all processes or on none.
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        outputs = outputs.index_select(0, order.argsort()).reshape(-1, count, tokens.shape[1])
        mixed = (outputs * weights.to(outputs.dtype)[..., None]).sum(dim=1)
        mixed = mixed.to(hidden_states.dtype).reshape(hidden_states.shape)
        return mixed if self.shared_mlp is None else self.shared_mlp(hidden_states) + mixed
