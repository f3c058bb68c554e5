"""Learning-rate schedules as functions of the step: configured schedules, replayed to the step of a checkpoint."""

import copy
import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Group = dict[str, Any]
"""Settings of a parameter group, without its parameters."""

MEASURED = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
"""State of `ReduceLROnPlateau` that depends on the course of the training."""


def group_settings(group: dict[str, Any]) -> Group:
    """Settings of a parameter group as plain values: some optimizers have a tensor as learning rate."""
    plain = {name: value.item() if isinstance(value, Tensor) else value for name, value in group.items() if name != "params"}
    return {name: value for name, value in plain.items() if isinstance(value, int | float | tuple)}


class Schedule:
    """A configured scheduler and its state at the start of the schedule.

    Args:
        config: The scheduler, before a checkpoint is restored.
    """

    def __init__(self, config: LRSchedulerConfig) -> None:
        self.config = config
        self._start: Any = None
        if isinstance(config.scheduler, LRScheduler) and not self.is_measured:
            optimizer = config.scheduler.optimizer
            # Copied with the scheduler, except the optimizer, whose parameters and states may be large.
            self._start = copy.deepcopy(config.scheduler, {id(optimizer): _without_parameters(optimizer)})
        elif self.is_measured:
            self._start = dict(config.scheduler.state_dict())

    @property
    def name(self) -> str:
        """Name of the scheduler's class."""
        return type(self.config.scheduler).__name__

    @property
    def is_measured(self) -> bool:
        """Whether the rates depend on a metric, so that they are no function of the step."""
        return isinstance(self.config.scheduler, ReduceLROnPlateau)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer."""
        groups: list[dict[str, Any]] = self.config.scheduler.optimizer.param_groups
        return groups

    def steps(self, trainer: Trainer, saved: dict[str, Any] | None) -> int:
        """Scheduler steps up to a checkpoint: those that it has counted, or those that this schedule would have taken."""
        if saved is not None and "last_epoch" in saved:
            return int(saved["last_epoch"])
        return (trainer.current_epoch if self.config.interval == "epoch" else trainer.global_step) // self.config.frequency

    def continue_at(self, steps: int) -> list[Group]:
        """Set the scheduler, but not its optimizer, to a step; returns the settings of the optimizer's groups there."""
        replayed = self._start
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no optimizer steps between the scheduler's
            for _ in range(steps):
                replayed.step()
        self.config.scheduler.load_state_dict(replayed.state_dict())
        return [group_settings(group) for group in replayed.optimizer.param_groups]

    def continue_measured(self, saved: dict[str, Any] | None) -> None:
        """Restore what a scheduler has measured, and keep its configured settings."""
        known = saved or {}
        self.config.scheduler.load_state_dict({**self._start, **{name: known[name] for name in MEASURED if name in known}})

    @property
    def is_replayable(self) -> bool:
        """Whether the scheduler is one of torch, whose rates are a function of the step."""
        return isinstance(self._start, LRScheduler)


def _without_parameters(optimizer: Optimizer) -> Optimizer:
    """An optimizer with the settings of another one, each group with a single small parameter."""
    groups = [{"params": [torch.zeros(1)], **group_settings(group)} for group in optimizer.param_groups]
    result = torch.optim.SGD(groups, lr=0.0)
    result.defaults = dict(optimizer.defaults)  # some schedulers look there for the kind of momentum
    return result
