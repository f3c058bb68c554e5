"""Checks of weights and optimizer states, and what an error about NaN or infinity says: cause, remedy, checkpoint."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_distill.errors import NonFiniteError
from lightning_distill.sharding.finite import named_tensors, non_finite, ranges
from lightning_distill.sharding.protocols import auxiliary_optimizers, auxiliary_paths, saved_tensors

GROWTH = 100.0
"""Factor by which the largest weight of a network does not grow in a training that converges."""
_NAMES = {"networks.student": "student", "networks.ema": "EMA"}


@dataclass(frozen=True)
class SavedState:
    """A checkpoint.

    Attributes:
        path: Path of the file or directory.
        step: Its number of optimizer steps.
        largest: Largest absolute value of its weights, in this process's part.
    """

    path: str
    step: int
    largest: float


@runtime_checkable
class SavesStates(Protocol):
    """A callback that saves checkpoints."""

    @property
    def saved_states(self) -> Sequence[SavedState]:
        """The checkpoints from which the run can be resumed, the newest last."""


def largest_weights(module: LightningModule) -> dict[str, float]:
    """Largest absolute weight of each network by name, such as student, EMA or critic; NaN if there is one."""
    found: dict[str, float] = {}
    paths = auxiliary_paths(module)
    for name, bounds in ranges(saved_tensors(module)).items():
        network = _network(name, paths)
        values = (found.get(network, 0.0), *map(abs, bounds))
        found[network] = math.nan if any(map(math.isnan, values)) else max(values)
    return found


def check_weights(trainer: Trainer, module: LightningModule) -> None:
    """Check in all processes that what a checkpoint holds is finite.

    Parameters and optimizer states have to be finite. Buffers may be infinite, as masks are, but not NaN.

    Raises:
        NonFiniteError: In all processes, if something is not finite in one of them.
    """
    weights = saved_tensors(module)
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    broken = [
        (f"weight {name!r}", _network(name, auxiliary_paths(module)))
        for name, bounds in ranges(weights).items()
        if any(map(math.isnan, bounds)) or (name in parameters and any(map(math.isinf, bounds)))
    ]
    broken = broken or [(f"optimizer state {name!r}", network) for name, network in _broken_states(trainer, module)]
    if not trainer.strategy.reduce_boolean_decision(bool(broken), all=False):
        return
    what, network = broken[0] if broken else ("part in another process", "model")
    raise NonFiniteError(f"the {network} is not finite at step {trainer.global_step} (its {what})", network)


def _broken_states(trainer: Trainer, module: LightningModule) -> list[tuple[str, str]]:
    optimizers: dict[str, Any] = {f"optimizer {i}": each for i, each in enumerate(trainer.optimizers)}
    optimizers |= {path: each.optimizer for path, each in auxiliary_optimizers(module).items()}
    return [
        (name.rpartition(".")[2], path.rpartition(".")[2])
        for path, optimizer in optimizers.items()
        for name in non_finite(dict(named_tensors(dict(enumerate(optimizer.state.values())))))
    ]


def explain(error: NonFiniteError, trainer: Trainer, module: LightningModule, start: Mapping[str, float], batch: Any) -> str:
    """The message of an error with its cause, the remedy, and the checkpoint to resume from.

    Args:
        error: The error.
        trainer: The trainer.
        module: Its module.
        start: `largest_weights` at the start of training.
        batch: The last batch, whose samples may be the cause.
    """
    if sample := broken_sample(batch):
        return f"{error}: {sample}; repair the sample or remove it from the data, and {_advice(trainer, start)}"
    grown = _grown(start, largest_weights(module))
    if grown is None:
        rate = f"the learning rate of the {error.network}" if error.network in _auxiliary(module) else "the learning rate"
        return f"{error}; lower {rate} or set trainer.gradient_clip_val, and {_advice(trainer, start)}"
    network, before, after = grown
    what = str(error) if error.network in (None, network) else f"training diverged at step {trainer.global_step}"
    rates = ", ".join(f"{group['lr']:.3g}" for each in trainer.optimizers for group in each.param_groups[:1])
    rate = f"the learning rate of the {network}" if network in _auxiliary(module) else f"the learning rate, now {rates}"
    return (
        f"{what}: the largest weight of the {network} went from {before:.3g} to {after:.3g}; lower {rate}, and "
        f"{_advice(trainer, start)}"
    )


def broken_sample(batch: Any) -> str | None:
    """Text that names the first sample of a batch with values that are not finite, or None."""
    if not isinstance(batch, Mapping):
        return None
    for name in non_finite(dict(named_tensors(batch))):
        values: Tensor = dict(named_tensors(batch))[name]
        rows = (~values.isfinite()).flatten(1).any(1).nonzero().flatten().tolist() if values.ndim > 1 else [0]
        prompts = batch.get("prompt", ())
        prompt = f", with the prompt {prompts[rows[0]][:60]!r}," if rows[0] < len(prompts) else ""
        return f"the values {name!r} of a data sample, number {rows[0] + 1} of its batch{prompt} are not finite"
    return None


def _advice(trainer: Trainer, start: Mapping[str, float]) -> str:
    states = [
        state
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, SavesStates)
        for state in callback.saved_states
        if Path(state.path).exists() and state.largest <= GROWTH * max(start.values(), default=math.inf)
    ]
    if not states:
        return "start again: there is no checkpoint from before"
    newest = max(states, key=lambda state: state.step)
    relative = os.path.relpath(newest.path)
    return f"resume with --ckpt_path {newest.path if relative.startswith('..') else relative} (step {newest.step})"


def _grown(start: Mapping[str, float], now: Mapping[str, float]) -> tuple[str, float, float] | None:
    """The network whose largest weight has grown most, if by more than `GROWTH`, with that weight before and now."""
    factors = {
        name: value / start[name] if math.isfinite(value) else math.inf for name, value in now.items() if start.get(name)
    }
    if not factors:
        return None
    # The EMA follows the student.
    name = max(factors, key=lambda each: (factors[each], each != "EMA"))
    return (name, start[name], now[name]) if factors[name] > GROWTH else None


def _auxiliary(module: LightningModule) -> set[str]:
    return {path.rpartition(".")[2] for path in auxiliary_paths(module)}


def _network(name: str, auxiliary: Sequence[str]) -> str:
    """Name of the network that a weight belongs to."""
    for path in (*auxiliary, *_NAMES):
        if name.startswith(f"{path}."):
            return _NAMES.get(path, path.rpartition(".")[2])
    return name.partition(".")[0]
