"""Mixtures of experts whose routing can be held: a later pass sends its tokens where an earlier one sent them.

The choice of the k best experts is piecewise constant, so its derivative is that of the routing weights with the choice held.
Passes that are compared, as of a difference in time, must not choose anew: where one of them flips a choice, they differ by
a jump that no derivative has. Nor may a pass that is run again for the backward pass.

This file imports torch only: it travels with every exported student and must run without this package.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_held: ContextVar[Routing | None] = ContextVar("held routing", default=None)


class Routing:
    """What mixtures chose in the first pass under it, and choose in every later one.

    ::

        routing = Routing()
        with routing:
            first = network(x)
        with routing:
            second = network(x + change)  # by the same experts

    Args:
        within: A routing that is asked where this one has no choice yet.
    """

    def __init__(self, within: Routing | None = None) -> None:
        self.within = within
        self._chosen: dict[nn.Module, Tensor] = {}
        self._entered: list[Token[Routing | None]] = []

    def __enter__(self) -> Routing:
        self._entered.append(_held.set(self))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _held.reset(self._entered.pop())

    def choose(self, mixture: nn.Module, probabilities: Tensor, count: int) -> Tensor:
        """Experts (N, count) of the tokens of a mixture: those chosen before, or the most probable.

        Args:
            mixture: Whose experts they are.
            probabilities: (N, E).
            count: Experts of a token.

        Raises:
            RuntimeError: If the choice was made for another number of tokens.
        """
        if mixture not in self._chosen:
            self._chosen[mixture] = choose_experts(mixture, probabilities, count, self.within)
        chosen = self._chosen[mixture]
        if len(chosen) != len(probabilities):
            raise RuntimeError(
                f"the routing of {len(chosen)} tokens is held, and a pass has {len(probabilities)}; hold one routing for each "
                "set of inputs"
            )
        return chosen


def choose_experts(mixture: nn.Module, probabilities: Tensor, count: int, routing: Routing | None) -> Tensor:
    """Experts (N, count) of a mixture by a routing, or the most probable where there is none."""
    if routing is not None:
        return routing.choose(mixture, probabilities, count)
    with torch.no_grad():
        return probabilities.topk(count, dim=1).indices


def tokens_of_each(experts: Tensor, count: int) -> list[int]:
    """How many tokens each of `count` experts gets, of the expert of each of N tokens (N,)."""
    shares: list[int] = experts.bincount(minlength=count).tolist()
    return shares


def checkpointed(block: Callable[..., tuple[Any, ...]], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Call a block, and again in the backward pass, with its tokens at the same experts.

    Two runs of the same operations may round differently, and a token on the border of two experts would change sides: the
    activations of the second run would not be those that the loss came from.

    Args:
        block: Returns a tuple that begins with hidden states.
        *args: Of the block.
        **kwargs: Likewise.
    """
    if not torch.is_grad_enabled():
        return block(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        hidden_states, *rest = block(*args, **kwargs)
        # An operation that keeps a number, so that the second run starts before the backward pass of any module and ends after
        # the forward pass of all: ZeRO-3 takes a module's weights away when its forward pass ends, whoever else needs them.
        return hidden_states * hidden_states.new_ones(()), *rest

    routing = Routing(within=_held.get())
    outputs: tuple[Any, ...] = checkpoint(run, *args, use_reentrant=False, context_fn=lambda: (routing, routing), **kwargs)
    return outputs


class RoutedExperts(nn.Module):
    r"""Stands where HunyuanImage 3.0 has its mixture of experts, computes the same, and asks the held routing first.

    .. math:: y = S(x) + \sum_{e \in K(x)} \frac{p_e(x)}{\sum_{f \in K(x)} p_f(x)} E_e(x), \quad p = \mathrm{softmax}(W x),

    with the k most probable experts K and the shared expert S, where there is one. Unlike the published implementation it runs
    on any device, and in forward mode.

    Args:
        stock: The mixture that it replaces, whose parts it takes over under their names.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.gate = stock.gate
        self.experts = stock.experts
        self.shared_mlp: nn.Module | None = getattr(stock, "shared_mlp", None)
        self.experts_per_token: int = stock.moe_topk

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states (B, L, D) of hidden states (B, L, D)."""
        tokens, count = hidden_states.reshape(-1, hidden_states.shape[-1]), self.experts_per_token
        with torch.autocast(tokens.device.type, enabled=False):
            probabilities = self.gate.wg(tokens.to(next(self.gate.wg.parameters()).dtype)).softmax(dim=1)
            chosen = choose_experts(self, probabilities, count, _held.get())
            weights = probabilities.gather(1, chosen)
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-8)

        experts = chosen.flatten()
        order = experts.argsort(stable=True)
        shares = tokens_of_each(experts, len(self.experts))
        parts = tokens.index_select(0, order // count).split(shares)
        # Experts without a token run as well: sharded strategies gather their weights on all processes or on none.
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        outputs = outputs.index_select(0, order.argsort()).reshape(-1, count, tokens.shape[1])
        mixed = (outputs * weights.to(outputs.dtype)[..., None]).sum(dim=1)
        mixed = mixed.to(hidden_states.dtype).reshape(hidden_states.shape)
        return mixed if self.shared_mlp is None else self.shared_mlp(hidden_states) + mixed
