"""Randomness that survives an interruption."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

_KEY = "random_state"


def random_state() -> dict[str, Any]:
    """State of Python's, numpy's, torch's and every CUDA generator, in types that load with `weights_only=True`."""
    legacy: Any = np.random.get_state()
    name, keys, position, has_gauss, gauss = legacy
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class RandomState(Callback):
    """Saves the random generators of every process in the checkpoint, so that a resumed run repeats the interrupted one.

    The states go back at the last moment before training goes on, after set-up has drawn what it likes. Validation is
    given the generators on loan: how often it runs does not change what training draws.
    """

    def __init__(self) -> None:
        self._to_restore: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None
        self._fresh = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states of all processes, in the order of their ranks."""
        # A resumed run may begin with a validation, before what it is to go on with is in place.
        state = self._to_restore or self._before_validation or random_state()
        states: list[Any] = [None] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(states, state)
        else:
            states = [state]
        checkpoint[_KEY] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep this process's state until training goes on."""
        states = checkpoint.get(_KEY)
        if states is None or len(states) != trainer.world_size:
            saved = "without random states" if states is None else f"by {len(states)} processes"
            rank_zero_warn(
                f"the checkpoint was saved {saved} and is resumed by {trainer.world_size}; "
                "the run goes on with fresh randomness and will not repeat the interrupted one"
            )
            self._fresh = True
            return
        self._to_restore = states[trainer.global_rank]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore where the checkpoint was saved between epochs."""
        self._restore(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore where the checkpoint was saved within an epoch."""
        self._restore(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the training's states."""
        if trainer.state.fn == "fit":
            self._before_validation = random_state()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give them back."""
        if self._before_validation is not None:
            set_random_state(self._before_validation)
            self._before_validation = None

    def _restore(self, trainer: Trainer) -> None:
        if self._to_restore is not None:
            set_random_state(self._to_restore)
            self._to_restore = None
        if self._fresh:  # the seed alone would draw again what the first steps have drawn
            torch.manual_seed((torch.initial_seed() + 1_000_003 * trainer.global_step) % 2**63)
            self._fresh = False
