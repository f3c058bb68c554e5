"""The switch from the discrete to the differential solution, and the way back."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.sharding.protocols import Sharding
from lightning_distill.sharding.shared_weights import own_state_dict

Weights = dict[str, dict[str, Tensor]]


@dataclass
class SwitchState:
    """Where the switch stands; saved in checkpoints.

    Attributes:
        passes: Consecutive validations beyond the threshold.
        observed: The monitored value of the last validation.
        origin: The solution before the switch.
        step: Step of the switch, None before it.
        value: The monitored value at the switch, which the guard compares with.
        returned_at: Step of the return, None before it.
    """

    passes: int = 0
    observed: float | None = None
    origin: str | None = None
    step: int | None = None
    value: float | None = None
    returned_at: int | None = None


class SwitchSolution(Callback):
    """Moves a method from one solution to another once it is ready for it, and back if it was not.

    The switch comes when the monitored metric has been beyond the threshold for `patience` validations in a row, and at
    `latest_step` in any case. If the metric then worsens by `guard_factor`, the solution, the student and its average
    become again what they were at the switch, for good. The optimizer starts its moments afresh there: those at hand belong to
    gradients of weights that are given up, and those of the switch would be two more copies of the student to keep.

    While the guard can still act, the weights of the switch are kept in the memory of the CPU and in every checkpoint, so
    that a resumed run can return as well. A checkpoint grows by as much as the student and its average take. Under a strategy
    that spreads networks, each process keeps its parts.

    Steps are optimizer steps. The method logs `train/phase`; the switch adds `switch/step` and `switch/value`, a return
    `switch/returned_at`.

    Args:
        monitor: A positive metric that validation logs.
        threshold: Value of the metric that it must pass; None leaves the switch to `latest_step`.
        mode: Whether the metric passes and is better below ("min") or above ("max").
        patience: Consecutive validations beyond the threshold that it takes.
        earliest_step: Step before which the metric does not switch.
        latest_step: Step from which on the new solution trains, whatever the metric; None is never.
        to: The solution to move to.
        guard_factor: How many times worse than at the switch the metric must be for the return, above 1; None is never.

    Raises:
        ConfigurationError: If settings are out of range or contradict each other, or the method has no such solution.
    """

    def __init__(
        self,
        monitor: str = "val/average_velocity_error",
        threshold: float | None = None,
        mode: str = "min",
        patience: int = 1,
        earliest_step: int = 0,
        latest_step: int | None = None,
        to: str = "differential",
        guard_factor: float | None = 2.0,
    ) -> None:
        if threshold is None and latest_step is None:
            raise ConfigurationError("SwitchSolution would never switch; set its threshold, its latest_step or both")
        if mode not in ("min", "max"):
            raise ConfigurationError(f"SwitchSolution.mode is {mode!r}; choose min for an error, max for an accuracy")
        if patience < 1:
            raise ConfigurationError(f"SwitchSolution.patience is {patience}; at least 1 validation must pass the threshold")
        if latest_step is not None and latest_step < earliest_step:
            raise ConfigurationError(
                f"SwitchSolution.latest_step is {latest_step}, before earliest_step {earliest_step}; put it at or after that"
            )
        if guard_factor is not None and not guard_factor > 1:
            raise ConfigurationError(f"SwitchSolution.guard_factor is {guard_factor}; set it above 1, or to null for no guard")
        self.monitor = monitor
        self.threshold = threshold
        self.mode = mode
        self.patience = patience
        self.earliest_step = earliest_step
        self.latest_step = latest_step
        self.to = to
        self.guard_factor = guard_factor
        self.state = SwitchState()
        self._weights: Weights | None = None
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a method that this cannot work with."""
        if stage != "fit":
            return
        method = _phased(pl_module)
        if self.to not in method.phases:
            raise ConfigurationError(f"SwitchSolution.to is {self.to!r}; choose one of {', '.join(method.phases)}")
        method.expect_phase(self.to)
        if method.phase == self.to and self.state.step is None:
            raise ConfigurationError(
                f"model.solution is {self.to!r} already, which SwitchSolution switches to; start from another solution or "
                "leave the callback out"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on in the phase that the checkpoint was saved in."""
        if self.guard_factor is None and (sharding := _sharding(trainer)) is not None:
            sharding.take_snapshot(())  # drops that of the checkpoint
        if self.state.step is not None:
            _set_phase(pl_module, self.to if self.state.returned_at is None else str(self.state.origin))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switch at `latest_step`: here, the student's average has taken in the last step, at the end of a batch not yet."""
        if self.latest_step is not None and trainer.global_step >= self.latest_step and self._waits(pl_module):
            self._switch(trainer, pl_module, f"latest_step {self.latest_step}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the metric, then switch, return or wait."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        waits = self._waits(pl_module)
        if not waits and not self._can_return(trainer):
            return
        value = self._read(trainer, needed=waits and self.latest_step is None)
        if value is None:
            return
        self.state.observed = value
        if waits:
            self.state.passes = self.state.passes + 1 if self._passes(value) else 0
            if self.state.passes >= self.patience and trainer.global_step >= self.earliest_step:
                self._switch(trainer, pl_module, f"threshold {self.threshold}")
        elif self.state.value is None:  # switched by `latest_step` before any validation: the first value is the measure
            self.state.value = value
        elif self._worsened(value, self.state.value):
            self._return(trainer, pl_module, value)

    def state_dict(self) -> dict[str, Any]:
        """The phase, and the weights that the guard would return to, unless a sharded strategy saves them."""
        return {**asdict(self.state), "weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them; weights are dropped where this run has no guard."""
        state = dict(state_dict)
        weights = state.pop("weights")
        self._weights = weights if self.guard_factor is not None else None
        self.state = SwitchState(**state)

    def _waits(self, pl_module: LightningModule) -> bool:
        return self.state.step is None and _phased(pl_module).phase != self.to

    def _read(self, trainer: Trainer, *, needed: bool) -> float | None:
        found = trainer.callback_metrics.get(self.monitor)
        # Rank zero decides for all, even where a metric was logged without synchronization.
        value: float | None = trainer.strategy.broadcast(None if found is None else float(found))
        if value is None and needed:
            raise ConfigurationError(
                f"SwitchSolution.monitor is {self.monitor!r}, which validation does not log (it logs "
                f"{', '.join(sorted(trainer.callback_metrics)) or 'nothing'}); monitor another metric or set latest_step"
            )
        if value is None and not self._warned and (self.threshold is not None or self.guard_factor is not None):
            self._warned = True
            rank_zero_warn(f"SwitchSolution: validation does not log {self.monitor!r}; threshold and guard wait for it")
        return value

    def _passes(self, value: float) -> bool:
        if self.threshold is None:
            return False
        return value < self.threshold if self.mode == "min" else value > self.threshold

    def _worsened(self, value: float, reference: float) -> bool:
        assert self.guard_factor is not None
        if not math.isfinite(value):
            return True
        return value > reference * self.guard_factor if self.mode == "min" else value < reference / self.guard_factor

    def _switch(self, trainer: Trainer, pl_module: LightningModule, reason: str) -> None:
        state = self.state
        state.origin, state.step, state.value = _phased(pl_module).phase, trainer.global_step, state.observed
        if self.guard_factor is not None:
            self._keep(trainer, pl_module)
        _set_phase(pl_module, self.to)
        value = "not measured yet" if state.value is None else f"{state.value:.4g}"
        rank_zero_info(
            f"SwitchSolution: {state.origin} to {self.to} at step {state.step} ({reason}; {self.monitor} is {value})"
        )
        _log(trainer, {"switch/step": state.step, "switch/value": state.value})

    def _keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        method = _phased(pl_module)
        networks = method.snapshot_networks()
        if (sharding := _sharding(trainer)) is None:
            self._weights = {path: _copy(own_state_dict(module, method.teacher)) for path, module in networks.items()}
        else:
            sharding.take_snapshot(tuple(networks))

    def _can_return(self, trainer: Trainer) -> bool:
        sharding = _sharding(trainer)
        return self._weights is not None if sharding is None else sharding.has_snapshot

    def _take_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.inference_mode(False), torch.no_grad():
            if (sharding := _sharding(trainer)) is not None:
                sharding.restore_snapshot()
                sharding.take_snapshot(())
            else:
                assert self._weights is not None
                for path, module in _phased(pl_module).snapshot_networks().items():
                    module.load_state_dict({**module.state_dict(), **self._weights[path]})  # weights of a shared base stay
                self._weights = None
            for optimizer in trainer.optimizers:
                optimizer.zero_grad(set_to_none=True)  # what has accumulated is of the weights that are given up
                _forget_moments(optimizer, kept_in_place=sharding is not None)

    def _return(self, trainer: Trainer, pl_module: LightningModule, value: float) -> None:
        state = self.state
        self._take_back(trainer, pl_module)
        state.returned_at = trainer.global_step
        _set_phase(pl_module, str(state.origin))
        rank_zero_info(
            f"SwitchSolution: back to {state.origin} at step {state.returned_at} with the weights of step {state.step}: "
            f"{self.monitor} went from {state.value:.4g} at the switch to {value:.4g} (guard_factor {self.guard_factor:g})"
        )
        _log(trainer, {"switch/returned_at": state.returned_at, "switch/value": value})


def _phased(pl_module: LightningModule) -> TeacherStudentBase:
    if not isinstance(pl_module, TeacherStudentBase) or len(pl_module.phases) < 2:
        raise ConfigurationError(
            f"SwitchSolution needs a method with several solutions, and {type(pl_module).__name__} has none; remove the "
            "callback"
        )
    return pl_module


def _set_phase(pl_module: LightningModule, phase: str) -> None:
    method = _phased(pl_module)
    if method.phase != phase:
        method.phase = phase


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.inference_mode(False):  # validation runs in inference mode, whose tensors cannot be used in training
        return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


def _sharding(trainer: Trainer) -> Sharding | None:
    return trainer.strategy if isinstance(trainer.strategy, Sharding) else None


def _forget_moments(optimizer: Optimizer, kept_in_place: bool) -> None:
    """Start afresh; in place where a sharded checkpoint would let an empty state be made by a step that counts."""
    for part in (optimizer, *vars(optimizer).values()):  # an optimizer may be made of others
        if not isinstance(part, Optimizer):
            continue
        if not kept_in_place:
            part.state.clear()
        for values in part.state.values():
            for name, value in values.items():
                values[name] = value.zero_() if isinstance(value, Tensor) else 0


def _log(trainer: Trainer, values: dict[str, float | None]) -> None:
    """Log on the x-axis that Lightning gives all curves; `self.log` is closed at the end of validation."""
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logger.log_metrics({name: value for name, value in values.items() if value is not None}, step=step)
