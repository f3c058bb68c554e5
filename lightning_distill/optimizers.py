"""Optimizers and learning-rate schedules for the configs that torch does not provide."""

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
"""Key of a flattened block tensor; its value is the name of the tensor's class."""


class MuonWithAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for the matrices of transformer blocks and AdamW for all other parameters, as one optimizer.

    Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982), so that learning rates of both are comparable.

    Args:
        params: Parameter groups; Muon updates those with `block_matrices: True`.
        lr: Learning rate of Muon, for the block matrices.
        adamw_lr: Learning rate of AdamW, for all other parameters.
        momentum: Momentum of Muon, in [0, 1).
        betas: Betas of AdamW.
        weight_decay: Decoupled weight decay of both.

    Raises:
        ConfigurationError: If a setting is out of its range, or the parameter groups are not of both kinds.
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
        for name, rate in {"lr": lr, "adamw_lr": adamw_lr, "weight_decay": weight_decay}.items():
            if not 0 <= rate < math.inf:
                raise ConfigurationError(f"optimizer.{name} is {rate}; set it to 0 or more")
        if not 0 <= momentum < 1:
            raise ConfigurationError(f"optimizer.momentum is {momentum}; set it to 0 or more, and below 1")
        if not all(0 <= beta < 1 for beta in betas):
            raise ConfigurationError(f"optimizer.betas is {list(betas)}; set both to 0 or more, and below 1")
        groups = [dict(group) for group in params]
        matrices = [group for group in groups if group.get("block_matrices") and group["params"]]
        rest = [group for group in groups if not group.get("block_matrices") and group["params"]]
        if not matrices or not rest:
            raise ConfigurationError(
                "MuonWithAdamW needs both block matrices and other parameters; set model.optimizer to torch.optim.AdamW"
            )
        self.muon = Muon(
            [p for group in matrices for p in group["params"]],
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = AdamW([p for group in rest for p in group["params"]], lr=adamw_lr, betas=betas, weight_decay=weight_decay)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        # The same dict objects, so that a scheduler's learning rate reaches the inner optimizers.
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Run one step of both optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both optimizers."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of both optimizers."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]


def has_block_state(optimizer: Optimizer) -> bool:
    """Whether an optimizer stores its state as blocks of low-bit numbers with a scale, as those of torchao do."""
    return type(optimizer).__module__.startswith("torchao.") and hasattr(optimizer, "block_size")


def flatten_block_state(state: Any) -> Any:
    """Replace block tensors in the state of optimizers by dicts of plain tensors; Lightning cannot load other tensors."""
    if isinstance(state, dict):
        return {name: flatten_block_state(value) for name, value in state.items()}
    if isinstance(state, list):
        return [flatten_block_state(value) for value in state]
    if not isinstance(state, Tensor) or not type(state).__module__.startswith("torchao."):
        return state
    names, attributes = state.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = {name: getattr(state, name) for name in names}
    return {BLOCKS: f"{type(state).__module__}.{type(state).__qualname__}", "parts": parts, "attributes": attributes}


def unflatten_block_state(state: Any) -> Any:
    """Restore the state that `flatten_block_state` has flattened.

    Raises:
        ConfigurationError: If the class of a block tensor is unknown.
    """
    if isinstance(state, list):
        return [unflatten_block_state(value) for value in state]
    if not isinstance(state, dict):
        return state
    if BLOCKS not in state:
        return {name: unflatten_block_state(value) for name, value in state.items()}
    # The classes that torchao has registered as safe to load.
    kinds = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in get_safe_globals() if isinstance(kind, type)}
    if state[BLOCKS] not in kinds:
        raise ConfigurationError(
            f"the checkpoint's optimizer state has the unknown class {state[BLOCKS]}; set model.optimizer as in the training "
            "that wrote it"
        )
    kind: Any = kinds[state[BLOCKS]]
    return kind.__tensor_unflatten__(state["parts"], state["attributes"])


def allow_clipping(optimizer: Optimizer, scaled: bool, clip: float | None) -> None:
    """Let Lightning clip gradients before a fused optimizer step.

    Lightning rejects this combination, because a fused step can unscale gradients itself.

    Args:
        optimizer: Optimizer of the trainer.
        scaled: Whether gradients are scaled, as only float16 does.
        clip: Norm that gradients are clipped to, or None.

    Raises:
        ConfigurationError: If scaled gradients would be clipped.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return
    if not scaled:
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    elif clip:
        raise ConfigurationError(
            f"model.optimizer is a fused {type(optimizer).__name__}, whose gradients trainer.precision 16-mixed cannot clip; "
            "set trainer.precision to bf16-mixed, trainer.gradient_clip_val to null, or model.optimizer.fused to false"
        )


def split_parameters(named_parameters: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Split trainable parameters into two groups: matrices of transformer blocks, marked `block_matrices`, and all others.

    Other optimizers than `MuonWithAdamW` ignore the mark.
    """
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (matrices if parameter.ndim == 2 and "blocks." in name else rest).append(parameter)
    groups = [{"params": matrices, "block_matrices": True}, {"params": rest, "block_matrices": False}]
    return [group for group in groups if group["params"]]


class WarmupCosine(LambdaLR):
    """Linear warm-up, then a half cosine to a fraction of the learning rate; one scheduler step per batch.

    Args:
        optimizer: The optimizer.
        total_steps: Steps of the full schedule.
        warmup_steps: Steps of the linear warm-up.
        last_fraction: Fraction of the learning rate at the end, in [0, 1].
        hold_steps: Steps with a learning rate of 0 before the warm-up. Only auxiliary networks, such as a critic, train
            meanwhile.

    Raises:
        ConfigurationError: If total_steps is not positive, warmup_steps or hold_steps is negative, their sum is not below
            total_steps, or last_fraction is outside [0, 1].
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        last_fraction: float = 0.0,
        hold_steps: int = 0,
    ) -> None:
        if total_steps < 1:
            raise ConfigurationError(
                f"lr_scheduler.total_steps is {total_steps}; set it to the number of optimizer steps, or trainer.max_steps if "
                "it refers to that (trainer.max_epochs alone sets no number of steps)"
            )
        if min(warmup_steps, hold_steps) < 0 or not hold_steps + warmup_steps < total_steps:
            hold = f" and lr_scheduler.hold_steps {hold_steps}" if hold_steps else ""
            raise ConfigurationError(
                f"lr_scheduler.warmup_steps is {warmup_steps}{hold}; set them to 0 or more, and their sum below total_steps, "
                f"which is {total_steps}"
            )

        if not 0 <= last_fraction <= 1:
            raise ConfigurationError(f"lr_scheduler.last_fraction is {last_fraction}; set it to a fraction in [0, 1]")

        def factor(step: int) -> float:
            elapsed = step - hold_steps
            if elapsed < 0:
                return 0.0
            if elapsed < warmup_steps:
                return (elapsed + 1) / warmup_steps
            progress = min(1.0, (elapsed - warmup_steps) / (total_steps - hold_steps - warmup_steps))
            return last_fraction + (1 - last_fraction) * 0.5 * (1 + math.cos(math.pi * progress))

        super().__init__(optimizer, factor)
