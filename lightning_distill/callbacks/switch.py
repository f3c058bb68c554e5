"""Switch between the solutions of a method during training, with a rollback."""

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
"""Weights by the path of their network and their name in it."""


@dataclass
class SwitchState:
    """State of a switch, saved in checkpoints.

    Attributes:
        passes: Number of consecutive validations beyond the threshold.
        observed: The monitored value at the last validation.
        origin: The phase before the switch.
        step: Step of the switch, None before it.
        value: The monitored value at the switch, the reference of the guard.
        returned_at: Step of the rollback, None before it.
    """

    passes: int = 0
    observed: float | None = None
    origin: str | None = None
    step: int | None = None
    value: float | None = None
    returned_at: int | None = None


class SwitchSolution(Callback):
    """Switches a method to another phase when a metric allows it, and rolls back if the metric then worsens.

    The phases of `MeanFlow` are its solutions. The switch comes when the monitored metric has been beyond the threshold for
    `patience` consecutive validations, and at `latest_step` at the latest. If the metric then worsens by `guard_factor`, a
    rollback restores the phase, the student and its EMA of the switch; there is no second switch. The rollback resets the
    optimizer's moments, because they belong to gradients of discarded weights. Saving the moments of the switch would take two
    more copies of the student.

    Until a rollback, the weights of the switch are in CPU memory and in every checkpoint. A resumed run can thus roll back as
    well. This enlarges a checkpoint by the size of the student and its EMA. Under a strategy that shards networks, each
    process stores its shards.

    Steps are optimizer steps. `MeanFlow` logs `train/phase`. This callback logs `switch/step` and `switch/value` at the switch,
    and `switch/returned_at` at a rollback.

    Args:
        monitor: A positive metric that validation logs.
        threshold: Value of the metric that permits the switch; None: the switch comes at `latest_step`.
        mode: "min" if lower values of the metric are better, "max" if higher values are.
        patience: Number of consecutive validations beyond the threshold, at least 1.
        earliest_step: Step before which the metric cannot switch.
        latest_step: Step of the switch regardless of the metric; None is never.
        to: The phase to switch to.
        guard_factor: Factor above 1 by which the metric must be worse than at the switch for a rollback; None is never.

    Raises:
        ConfigurationError: If settings are out of range or contradict each other.
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
            raise ConfigurationError(
                "SwitchSolution.threshold and SwitchSolution.latest_step are null, so it would never switch; set at least one"
            )
        if mode not in ("min", "max"):
            raise ConfigurationError(f"SwitchSolution.mode is {mode!r}; choose min for an error, max for an accuracy")
        if patience < 1:
            raise ConfigurationError(f"SwitchSolution.patience is {patience}; set it to at least 1 validation")
        if threshold is not None and not math.isfinite(threshold):
            raise ConfigurationError(f"SwitchSolution.threshold is {threshold}; set it to a finite number, or to null for none")
        if earliest_step < 0:
            raise ConfigurationError(f"SwitchSolution.earliest_step is {earliest_step}; set it to 0 or more")
        if latest_step is not None and latest_step < earliest_step:
            raise ConfigurationError(
                f"SwitchSolution.latest_step is {latest_step}, before earliest_step {earliest_step}; set it to at least that"
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

    @property
    def requires_metric(self) -> bool:
        """Whether the switch depends on the monitored metric: without it, the switch comes at `latest_step`."""
        return self.latest_step is None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the method's phases, and announce the target phase to the method.

        Raises:
            ConfigurationError: If the method has a single phase, lacks the phase `to`, or starts in it.
        """
        if stage != "fit":
            return
        method = _multi_phase(pl_module)
        if self.to not in method.phases:
            raise ConfigurationError(f"SwitchSolution.to is {self.to!r}; choose one of {', '.join(method.phases)}")
        method.expect_phase(self.to)
        if method.phase == self.to and self.state.step is None:
            raise ConfigurationError(
                f"model.solution is already {self.to!r}, the target of SwitchSolution; set model.solution to another solution, "
                "or remove the callback from trainer.callbacks"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue in the phase of the checkpoint."""
        if self.guard_factor is None and (sharding := _sharding(trainer)) is not None:
            sharding.take_snapshot(())  # drops the snapshot of the checkpoint
        if self.state.step is not None:
            _set_phase(pl_module, self.to if self.state.returned_at is None else str(self.state.origin))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switch at `latest_step`: here the EMA contains the last step, which is not certain at the end of a batch."""
        if self.latest_step is not None and trainer.global_step >= self.latest_step and self._is_pending(pl_module):
            self._switch(trainer, pl_module, f"latest_step {self.latest_step}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the metric, then switch, roll back or do nothing."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        pending = self._is_pending(pl_module)
        if not pending and not self._can_roll_back(trainer):
            return
        value = self._monitored_value(trainer, required=pending and self.requires_metric)
        if value is None:
            return
        self.state.observed = value
        if pending:
            self.state.passes = self.state.passes + 1 if self._passes_threshold(value) else 0
            if self.state.passes >= self.patience and trainer.global_step >= self.earliest_step:
                self._switch(trainer, pl_module, f"threshold {self.threshold}")
        elif self.state.value is None:  # `latest_step` came before any validation: the first value is the reference
            self.state.value = value
        elif self._worsened(value, self.state.value):
            self._roll_back(trainer, pl_module, value)

    def state_dict(self) -> dict[str, Any]:
        """The state, and the weights for a rollback; a sharding strategy saves its snapshot itself."""
        return {**asdict(self.state), "weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; drop the weights if this run has no guard."""
        state = dict(state_dict)
        weights = state.pop("weights")
        self._weights = weights if self.guard_factor is not None else None
        self.state = SwitchState(**state)

    def _is_pending(self, pl_module: LightningModule) -> bool:
        """Whether the switch is still to come."""
        return self.state.step is None and _multi_phase(pl_module).phase != self.to

    def _monitored_value(self, trainer: Trainer, *, required: bool) -> float | None:
        metric = trainer.callback_metrics.get(self.monitor)
        # Rank zero decides for all processes, even if a metric was logged without synchronization.
        value: float | None = trainer.strategy.broadcast(None if metric is None else float(metric))
        if value is None and required:
            raise ConfigurationError(
                f"SwitchSolution.monitor is {self.monitor!r}, which validation does not log (it logs "
                f"{', '.join(sorted(trainer.callback_metrics)) or 'nothing'}); monitor another metric or set latest_step"
            )
        if value is None and not self._warned and (self.threshold is not None or self.guard_factor is not None):
            self._warned = True
            rank_zero_warn(
                f"SwitchSolution: validation does not log {self.monitor!r}; threshold and guard wait for this metric"
            )
        return value

    def _passes_threshold(self, value: float) -> bool:
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
        state.origin, state.step, state.value = _multi_phase(pl_module).phase, trainer.global_step, state.observed
        if self.guard_factor is not None:
            self._take_snapshot(trainer, pl_module)
        _set_phase(pl_module, self.to)
        value = "not measured yet" if state.value is None else f"{state.value:.4g}"
        rank_zero_info(
            f"SwitchSolution: {state.origin} to {self.to} at step {state.step} ({reason}; {self.monitor} is {value})"
        )
        _log(trainer, {"switch/step": state.step, "switch/value": state.value})

    def _take_snapshot(self, trainer: Trainer, pl_module: LightningModule) -> None:
        method = _multi_phase(pl_module)
        networks = method.snapshot_networks()
        if (sharding := _sharding(trainer)) is None:
            self._weights = {path: _copy(own_state_dict(module, method.teacher)) for path, module in networks.items()}
        else:
            sharding.take_snapshot(tuple(networks))

    def _can_roll_back(self, trainer: Trainer) -> bool:
        sharding = _sharding(trainer)
        return self._weights is not None if sharding is None else sharding.has_snapshot

    def _restore_snapshot(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.inference_mode(False), torch.no_grad():
            if (sharding := _sharding(trainer)) is not None:
                sharding.restore_snapshot()
                sharding.take_snapshot(())
            else:
                assert self._weights is not None
                for path, module in _multi_phase(pl_module).snapshot_networks().items():
                    module.load_state_dict({**module.state_dict(), **self._weights[path]})  # shared base weights stay
                self._weights = None
            for optimizer in trainer.optimizers:
                optimizer.zero_grad(set_to_none=True)  # accumulated gradients belong to the discarded weights
                _reset_moments(optimizer, in_place=sharding is not None)

    def _roll_back(self, trainer: Trainer, pl_module: LightningModule, value: float) -> None:
        state = self.state
        self._restore_snapshot(trainer, pl_module)
        state.returned_at = trainer.global_step
        _set_phase(pl_module, str(state.origin))
        rank_zero_info(
            f"SwitchSolution: rollback to {state.origin} at step {state.returned_at} with the weights of step {state.step}: "
            f"{self.monitor} went from {state.value:.4g} at the switch to {value:.4g} (guard_factor {self.guard_factor:g})"
        )
        _log(trainer, {"switch/returned_at": state.returned_at, "switch/value": value})


def _multi_phase(pl_module: LightningModule) -> TeacherStudentBase:
    """The module as a method with more than one phase.

    Raises:
        ConfigurationError: If it has fewer.
    """
    if not isinstance(pl_module, TeacherStudentBase) or len(pl_module.phases) < 2:
        raise ConfigurationError(
            f"SwitchSolution needs a method with more than one solution, but {type(pl_module).__name__} has none to switch to; "
            "remove the callback from trainer.callbacks"
        )
    return pl_module


def _set_phase(pl_module: LightningModule, phase: str) -> None:
    method = _multi_phase(pl_module)
    if method.phase != phase:
        method.phase = phase


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.inference_mode(False):  # validation runs in inference mode, and training cannot use its tensors
        return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


def _sharding(trainer: Trainer) -> Sharding | None:
    return trainer.strategy if isinstance(trainer.strategy, Sharding) else None


def _reset_moments(optimizer: Optimizer, in_place: bool) -> None:
    """Reset the state of an optimizer and of the optimizers that it contains.

    Args:
        optimizer: The optimizer.
        in_place: Whether to zero the state, not remove it: sharded checkpoints initialize an empty state by a step that counts.
    """
    for part in (optimizer, *vars(optimizer).values()):  # an optimizer may contain others
        if not isinstance(part, Optimizer):
            continue
        if not in_place:
            part.state.clear()
        for values in part.state.values():
            for name, value in values.items():
                values[name] = value.zero_() if isinstance(value, Tensor) else 0


def _log(trainer: Trainer, values: dict[str, float | None]) -> None:
    """Log on the x-axis of all curves of Lightning; `self.log` is not allowed at the end of validation."""
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logger.log_metrics({name: value for name, value in values.items() if value is not None}, step=step)
