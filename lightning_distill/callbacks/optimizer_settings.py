"""Optimizer settings of a resumed run replace those of its checkpoint."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

_Groups = list[list[dict[str, Any]]]


class OptimizerSettings(Callback):
    """Applies changed optimizer settings when a run is resumed.

    A checkpoint contains the optimizer's state and its settings. Restoring it would silently undo a learning rate, weight decay
    or momentum that was changed for the resumed run. This callback saves the configured settings of the optimizers, and applies
    every setting that the resumed run has changed. A scheduled learning rate is scaled by the ratio of the new base rate to the
    old. Unchanged settings stay as restored, so that resuming is exact.
    """

    def __init__(self) -> None:
        self._given: _Groups = []
        self._saved: _Groups = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the configured settings before the checkpoint's state replaces them."""
        self._given = [[_settings(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply changed settings, and warn about each change."""
        changes = []
        for optimizer, given, saved in zip(trainer.optimizers, self._given, self._saved, strict=False):
            for group, new, old in zip(optimizer.param_groups, given, saved, strict=False):
                for name in new:
                    if name in old and new[name] != old[name]:
                        changes.append(f"{name} {old[name]} -> {new[name]}")
                        _apply(group, name, old[name], new[name])
        for config in trainer.lr_scheduler_configs:
            groups = config.scheduler.optimizer.param_groups
            if changes and hasattr(config.scheduler, "base_lrs"):
                config.scheduler.base_lrs = [group["initial_lr"] for group in groups]
        if changes:
            rank_zero_warn(f"training continues with changed optimizer settings: {', '.join(dict.fromkeys(changes))}")
        self._saved = []

    def state_dict(self) -> dict[str, Any]:
        """The configured settings of the optimizers."""
        return {"given": self._given}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read the configured settings of the checkpoint's run."""
        self._saved = state_dict["given"]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    # With a scheduler, `lr` is the scheduled rate; its base rate is `initial_lr`.
    scheduled = "lr" if "initial_lr" in group else None
    # Some optimizers have a tensor as learning rate, so that one compiled step serves all rates.
    plain = {name: value.item() if isinstance(value, Tensor) else value for name, value in group.items() if name != "params"}
    return {name: value for name, value in plain.items() if name != scheduled and isinstance(value, int | float | tuple)}


def _apply(group: dict[str, Any], name: str, old: Any, new: Any) -> None:
    if name == "initial_lr":
        rate = float(group["lr"])
        _set(group, "lr", rate * new / old if old else new)
    _set(group, name, new)


def _set(group: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value
