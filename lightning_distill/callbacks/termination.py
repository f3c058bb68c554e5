"""Joint end of all processes at SIGTERM, so that their checkpoint is complete."""

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
    """Ends all processes after the same step once one of them has received SIGTERM, for example from a cluster's scheduler.

    Lightning notifies the other processes inside its signal handler, by a collective. This collective can mix with those of the
    current step in the wrong order. Two processes of one machine then deadlock, and nothing is saved. Here the handler only
    records the signal, and after each step the processes reduce this flag. Lightning handles single processes.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the signal handler that Lightning has installed before."""
        if trainer.world_size == 1 or threading.current_thread() is not threading.main_thread():
            return
        launcher = trainer.strategy.launcher

        def record(number: int, frame: FrameType | None) -> None:
            if not self._received and isinstance(launcher, _SubprocessScriptLauncher):
                launcher.kill(signal.SIGTERM)
            self._received = True

        self._received = False
        self._previous = signal.signal(signal.SIGTERM, record)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End if a process has received SIGTERM."""
        self._end_if_signalled(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """End if a process has received SIGTERM: validation may take longer than the scheduler's grace period."""
        self._end_if_signalled(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore Lightning's handler."""
        self._restore_handler()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore Lightning's handler, unless SIGTERM is the cause: a second signal must not interrupt saving."""
        if not isinstance(exception, SIGTERMException):
            self._restore_handler()

    def _end_if_signalled(self, trainer: Trainer) -> None:
        if self._previous is None or not trainer.strategy.reduce_boolean_decision(self._received, all=False):
            return
        environment = getattr(trainer.strategy, "cluster_environment", None)
        started_by_lightning = isinstance(environment, LightningEnvironment) and environment.local_rank() > 0
        # When a process that Lightning started ends with an error, Lightning kills the first one, which may still be saving.
        raise SIGTERMException(0 if started_by_lightning else EXIT_CODE)

    def _restore_handler(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None
