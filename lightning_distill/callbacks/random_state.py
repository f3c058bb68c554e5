"""States of the random generators in checkpoints, for exact resumption."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

_KEY = "random_state"


def random_state() -> dict[str, Any]:
    """States of the generators of Python, numpy, torch and every CUDA device, in types that load with `weights_only=True`."""
    legacy: Any = np.random.get_state()
    name, keys, position, has_gauss, gauss = legacy
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the states that `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class RandomState(Callback):
    """Saves the random states of every process in the checkpoint, so that a resumed run repeats the interrupted one.

    The states are restored directly before training continues, because set-up uses the generators as well. After each
    validation the states from before it are restored. The random numbers of training thus do not depend on how often
    validation runs.
    """

    def __init__(self) -> None:
        self._to_restore: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None
        self._fresh = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states of all processes, in the order of their ranks."""
        # A resumed run may begin with a validation, before the states of the checkpoint are restored.
        state = self._to_restore or self._before_validation or random_state()
        states: list[Any] = [None] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(states, state)
        else:
            states = [state]
        checkpoint[_KEY] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read this process's state; it is restored when training continues."""
        states = checkpoint.get(_KEY)
        if states is None or len(states) != trainer.world_size:
            saved = "no random states" if states is None else f"the random states of {len(states)} processes"
            rank_zero_warn(
                f"the checkpoint has {saved}, and this run has {trainer.world_size} processes; "
                "it continues with new random numbers and does not repeat the interrupted run"
            )
            self._fresh = True
            return
        self._to_restore = states[trainer.global_rank]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the states if the checkpoint was saved between epochs."""
        self._restore(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore the states if the checkpoint was saved within an epoch."""
        self._restore(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the states of training."""
        if trainer.state.fn == "fit":
            self._before_validation = random_state()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the states of training."""
        if self._before_validation is not None:
            set_random_state(self._before_validation)
            self._before_validation = None

    def _restore(self, trainer: Trainer) -> None:
        if self._to_restore is not None:
            set_random_state(self._to_restore)
            self._to_restore = None
        if self._fresh:  # the seed alone would repeat the random numbers of the first steps
            torch.manual_seed((torch.initial_seed() + 1_000_003 * trainer.global_step) % 2**63)
            self._fresh = False
