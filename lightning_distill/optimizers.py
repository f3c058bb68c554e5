"""Optimizers and schedules that the configs name and torch does not have."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.serialization import get_safe_globals

from lightning_distill.errors import ConfigurationError

BLOCKS = "blocks"
"""Key of what `packed` makes of a tensor, under which its class is named."""


class MuonWithAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for the matrices of transformer blocks and AdamW for everything else, as one optimizer.

    Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982), so that both live with one kind of learning rate.

    Args:
        params: Parameter groups; those that say `block_matrices: True` go to Muon.
        lr: Learning rate of the block matrices.
        adamw_lr: Learning rate of the rest.
        momentum: Muon's momentum, in [0, 1).
        betas: AdamW's.
        weight_decay: Decoupled weight decay of both.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 3e-3,
        adamw_lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        groups = [dict(group) for group in params]
        matrices = [group for group in groups if group.get("block_matrices") and group["params"]]
        rest = [group for group in groups if not group.get("block_matrices") and group["params"]]
        if not matrices or not rest:
            raise ConfigurationError("MuonWithAdamW needs parameter groups of both kinds; use torch.optim.AdamW for this model")
        self.muon = Muon(
            [p for group in matrices for p in group["params"]],
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = AdamW([p for group in rest for p in group["params"]], lr=adamw_lr, betas=betas, weight_decay=weight_decay)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        # The very same dicts, so that a scheduler's new learning rate reaches the optimizer that uses it.
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of both optimizers."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of both optimizers."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]


def has_block_state(optimizer: Optimizer) -> bool:
    """Whether an optimizer keeps its state in blocks of a few bits a number and a scale: those of torchao do."""
    return type(optimizer).__module__.startswith("torchao.") and hasattr(optimizer, "block_size")


def packed(state: Any) -> Any:
    """The state of optimizers with its blocks taken apart into plain tensors: Lightning cannot read back others."""
    if isinstance(state, dict):
        return {name: packed(value) for name, value in state.items()}
    if isinstance(state, list):
        return [packed(value) for value in state]
    if not isinstance(state, Tensor) or not type(state).__module__.startswith("torchao."):
        return state
    names, attributes = state.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = {name: getattr(state, name) for name in names}
    return {BLOCKS: f"{type(state).__module__}.{type(state).__qualname__}", "parts": parts, "attributes": attributes}


def unpacked(state: Any) -> Any:
    """What `packed` was given.

    Raises:
        ConfigurationError: If there are blocks of a kind that is not known here.
    """
    if isinstance(state, list):
        return [unpacked(value) for value in state]
    if not isinstance(state, dict):
        return state
    if BLOCKS not in state:
        return {name: unpacked(value) for name, value in state.items()}
    # Those that torchao has declared safe to load.
    kinds = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in get_safe_globals() if isinstance(kind, type)}
    if state[BLOCKS] not in kinds:
        raise ConfigurationError(
            f"the checkpoint's optimizer kept its state as {state[BLOCKS]}; resume with the model.optimizer it was trained with"
        )
    kind: Any = kinds[state[BLOCKS]]
    return kind.__tensor_unflatten__(state["parts"], state["attributes"])


def allow_clipping(optimizer: Optimizer, scaled: bool, clip: float | None) -> None:
    """Let gradients be clipped before a fused step, which can undo a scale of gradients itself, so that Lightning refuses to.

    Args:
        optimizer: Of the trainer.
        scaled: Whether gradients have a scale, as in float16 alone.
        clip: The norm that they are clipped to, if they are.

    Raises:
        ConfigurationError: If they are to be clipped under a scale.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return
    if not scaled:
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    elif clip:
        raise ConfigurationError(
            f"model.optimizer is a fused {type(optimizer).__name__}, whose gradients trainer.precision 16-mixed cannot clip; "
            "set it to bf16-mixed, trainer.gradient_clip_val to null, or the optimizer's fused to false"
        )


def split_parameters(named_parameters: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Two parameter groups: the matrices inside transformer blocks, marked `block_matrices`, and the rest.

    Optimizers that do not know the mark ignore it.
    """
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (matrices if parameter.ndim == 2 and "blocks." in name else rest).append(parameter)
    groups = [{"params": matrices, "block_matrices": True}, {"params": rest, "block_matrices": False}]
    return [group for group in groups if group["params"]]


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine down to a last fraction of the learning rate; steps once a batch.

    Args:
        optimizer: The optimizer.
        total_steps: Steps of the whole schedule.
        warmup_steps: Steps of the linear part.
        last_fraction: Fraction of the learning rate at the end, in [0, 1].
        hold_steps: Steps before the warm-up, at a rate of 0: networks beside the student, such as a critic, learn alone.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        last_fraction: float = 0.0,
        hold_steps: int = 0,
    ) -> None:
        if min(warmup_steps, hold_steps) < 0 or not hold_steps + warmup_steps < total_steps:
            held = f" and lr_scheduler.hold_steps {hold_steps}" if hold_steps else ""
            raise ConfigurationError(
                f"lr_scheduler.warmup_steps is {warmup_steps}{held}; set them to 0 or more and, together, below total_steps, "
                f"which is {total_steps}"
            )

        if not 0 <= last_fraction <= 1:
            raise ConfigurationError(f"lr_scheduler.last_fraction is {last_fraction}; choose a fraction in [0, 1]")

        def factor(step: int) -> float:
            since = step - hold_steps
            if since < 0:
                return 0.0
            if since < warmup_steps:
                return (since + 1) / warmup_steps
            progress = min(1.0, (since - warmup_steps) / (total_steps - hold_steps - warmup_steps))
            return last_fraction + (1 - last_fraction) * 0.5 * (1 + math.cos(math.pi * progress))

        super().__init__(optimizer, factor)
