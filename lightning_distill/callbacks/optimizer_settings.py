"""Optimizer settings and learning rates of a resumed run: those configured now, at the step of the checkpoint."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_distill.callbacks.schedules import Group, Schedule, group_settings
from lightning_distill.errors import ConfigurationError


class OptimizerSettings(Callback):
    """Applies the configured optimizer settings and learning rates when a run is resumed.

    A checkpoint contains the optimizer's state and its settings. Restoring them would silently undo a learning rate, a
    schedule, weight decay or momentum that was changed for the resumed run. The settings of this run always count:

    - With a scheduler, the learning rate is that of its schedule at the step of the checkpoint, whatever scheduler the
      checkpoint has. `ReduceLROnPlateau` continues from its measurements, with its learning rate scaled to the new base rate.
    - Without a scheduler, the learning rate is the configured one, also if the checkpoint has a scheduler.
    - Other settings that differ from those that were configured for the checkpoint's run are replaced. Settings that are equal
      stay as restored, since some optimizers adapt them.

    A warning reports each change. The moments are restored; they fit the same class of optimizer only.

    Raises:
        ConfigurationError: If the checkpoint has the states of another class of optimizer.
    """

    def __init__(self) -> None:
        self._given: list[list[Group]] = []
        self._optimizers: list[str] = []
        self._schedules: list[Schedule] = []
        self._saved: dict[str, Any] = {}
        self._saved_schedulers: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the configured settings before the checkpoint's state replaces them."""
        self._given = [[group_settings(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        self._optimizers = [type(optimizer).__name__ for optimizer in trainer.optimizers]
        self._schedules = [Schedule(config) for config in trainer.lr_scheduler_configs]
        self._check_classes()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the states of the schedulers out, since restoring one would replace the arguments of a schedule."""
        if trainer.state.fn == "fit":
            self._saved_schedulers, checkpoint["lr_schedulers"] = checkpoint.get("lr_schedulers", []), []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the configured settings, and warn about each change."""
        if trainer.ckpt_path is None:
            return
        names = [schedule.name for schedule in self._schedules]
        saved_names = self._saved.get("schedulers", names)
        changes = [] if names == saved_names else [f"lr_scheduler {_listed(saved_names)} -> {_listed(names)}"]
        schedules = {id(schedule.groups): i for i, schedule in enumerate(self._schedules)}
        for i, optimizer in enumerate(trainer.optimizers):
            groups = optimizer.param_groups
            given, saved = self._given[i], self._saved_settings(i, groups)
            number = schedules.get(id(groups))
            rates = [float(group["lr"]) for group in given]
            scheduled: list[Group] = [{} for _ in given]
            if number is not None:
                scheduled, restored = self._continue_schedule(trainer, number, saved_names)
                if restored:  # rates that are no function of the step are multiples of the base rate
                    bases = [float(group["lr"]) for group in saved]
                    found = [float(group["lr"]) for group in groups]
                    rates = [rate * old / base if base else rate for rate, old, base in zip(rates, found, bases, strict=True)]
            for group, new, old, at_step, rate in zip(groups, given, saved, scheduled, rates, strict=True):
                # A scheduler may keep settings of its own in a group, which those of the checkpoint have replaced.
                target = {n: new[n] for n in new if n not in group or (n in old and old[n] != new[n])} | {"lr": rate}
                target |= {n: at_step[n] for n in new if n in at_step and (n in ("lr", "initial_lr") or at_step[n] != new[n])}
                if "initial_lr" not in new:
                    group.pop("initial_lr", None)
                changes += _apply(group, target)
        if changes:
            rank_zero_warn(f"training continues with changed optimizer settings: {', '.join(dict.fromkeys(changes))}")

    def state_dict(self) -> dict[str, Any]:
        """The configured settings of the optimizers, and the classes of optimizers and schedulers."""
        names = [schedule.name for schedule in self._schedules]
        return {"given": self._given, "optimizers": self._optimizers, "schedulers": names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read the configured settings of the checkpoint's run."""
        self._saved = dict(state_dict)
        self._check_classes()

    def _check_classes(self) -> None:
        """Compare the classes of optimizers as soon as those of the checkpoint and of this run are known."""
        for new, old in zip(self._optimizers, self._saved.get("optimizers", []), strict=False):
            if new != old:
                raise ConfigurationError(
                    f"model.optimizer is {new}, and the checkpoint has the states of {old}; resume with {old}, or export the "
                    "student and start a new run with it as student.pretrained"
                )

    def _saved_settings(self, number: int, groups: list[dict[str, Any]]) -> list[Group]:
        """Settings that were configured for the checkpoint's run; those in the restored groups if it did not record them."""
        saved: list[list[Group]] = self._saved.get("given", [])
        return saved[number] if number < len(saved) else [group_settings(group) for group in groups]

    def _continue_schedule(self, trainer: Trainer, number: int, saved_names: list[str]) -> tuple[list[Group], bool]:
        """Set a scheduler to the step of the checkpoint.

        Returns:
            The settings of its groups at that step, empty if they are no function of the step; and whether the learning rates
            of the checkpoint count, since the same scheduler has measured them.
        """
        schedule = self._schedules[number]
        same = number < len(saved_names) and saved_names[number] == schedule.name
        state = self._saved_schedulers[number] if same and number < len(self._saved_schedulers) else None
        if schedule.is_replayable:
            return schedule.continue_at(schedule.steps(trainer, state)), False
        if schedule.is_measured:
            schedule.continue_measured(state)
        elif state is not None:
            schedule.config.scheduler.load_state_dict(state)
        return [{} for _ in schedule.groups], state is not None


def _apply(group: dict[str, Any], target: Group) -> list[str]:
    """Set settings of a group; returns a text for each that changes."""
    changes = []
    for name, new in target.items():
        old = group_settings(group).get(name)
        if old == new:
            continue
        if isinstance(group.get(name), Tensor):
            group[name].fill_(new)
        else:
            group[name] = new
        rounding = isinstance(old, float) and math.isclose(old, new, rel_tol=1e-6)
        if name != "initial_lr" and old is not None and not rounding:
            changes.append(f"{name} {old} -> {new}")
    return changes


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
