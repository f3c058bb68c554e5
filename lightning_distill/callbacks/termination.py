"""Runs of several processes end at SIGTERM together, so that what they save is whole."""

import signal
import threading
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

EXIT_CODE = 128 + signal.SIGTERM


class JointTermination(Callback):
    """Ends all processes after the same step once one of them has received SIGTERM, as from a scheduler that wants its nodes.

    Lightning tells the other processes from within its signal handler, by a collective that meets those of the step under way
    in the wrong order: two processes of one machine then wait for each other for good, and nothing is saved. Here the handler
    only notes the signal, and after each step the processes ask each other whether one has. A single process is left to
    Lightning.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handler, which is there by now."""
        if trainer.world_size == 1 or threading.current_thread() is not threading.main_thread():
            return
        launcher = trainer.strategy.launcher

        def note(number: int, frame: FrameType | None) -> None:
            if not self._received and isinstance(launcher, _SubprocessScriptLauncher):
                launcher.kill(signal.SIGTERM)
            self._received = True

        self._received = False
        self._previous = signal.signal(signal.SIGTERM, note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End if a process was told to."""
        self._end_if_told(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Likewise: a validation may take longer than a scheduler waits."""
        self._end_if_told(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back Lightning's handler."""
        self._put_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put back Lightning's handler, but not where the signal is the cause: a second one must not disturb the saving."""
        if not isinstance(exception, SIGTERMException):
            self._put_back()

    def _end_if_told(self, trainer: Trainer) -> None:
        if self._previous is None or not trainer.strategy.reduce_boolean_decision(self._received, all=False):
            return
        environment = getattr(trainer.strategy, "cluster_environment", None)
        started_by_lightning = isinstance(environment, LightningEnvironment) and environment.local_rank() > 0
        # Lightning kills the first process, which may still be at work, when another that it has started ends with an error.
        raise SIGTERMException(0 if started_by_lightning else EXIT_CODE)

    def _put_back(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None
