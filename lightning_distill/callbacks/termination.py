"""Joint end of all processes at a signal, with a complete checkpoint."""

import atexit
import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

EXIT_CODE = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class JointTermination(Callback):
    """Ends all processes after the same step once one of them has received SIGTERM, SIGINT, SIGHUP or SIGUSR1.

    `AtomicCheckpoint` then saves the state, and the exit code is 128 plus the number of the signal. A second SIGINT (Ctrl-C)
    ends the process at once, without a checkpoint. Ignored signals stay ignored, as SIGHUP under `nohup`, and so do handlers
    of others, such as Lightning's for the requeue signal of SLURM.

    Lightning notifies the other processes of SIGTERM inside its signal handler, by a collective. This collective can mix with
    those of the current step in the wrong order. Two processes of one machine then deadlock, and nothing is saved. Here the
    handler only records the signal, and after each step the processes reduce this record.
    """

    def __init__(self) -> None:
        self._received = 0
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}
        self._terminals: list[int] = []
        self._launcher: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers; that of SIGTERM replaces Lightning's."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._received = self._interrupts = 0
        self._launcher = trainer.strategy.launcher
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            default = handler in (signal.SIG_DFL, signal.default_int_handler)
            if default or (number == signal.SIGTERM and handler is not signal.SIG_IGN):
                self._previous[number] = signal.signal(number, self._record)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if number == signal.SIGHUP:
            self._leave_terminal()
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                self._end_at_once()
            # Not by print: the signal may have interrupted one.
            self._say(b"\ninterrupted: ends after this step, with a checkpoint; press Ctrl-C again to end at once without\n")

    def _say(self, text: bytes) -> None:
        if isinstance(self._launcher, _SubprocessScriptLauncher) and not self._launcher.procs:
            return  # one of the processes that Lightning has started
        os.write(2, text)

    def _end_at_once(self) -> None:
        if isinstance(self._launcher, _SubprocessScriptLauncher):
            self._launcher.kill(signal.SIGKILL)
        os._exit(INTERRUPTED)

    def _leave_terminal(self) -> None:
        """Write to nowhere once the terminal is gone: a progress bar would fail before the checkpoint is saved."""
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(null, descriptor)
        os.close(null)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End if a process has received a signal."""
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
        """End if a process has received a signal: validation may take longer than the scheduler's grace period."""
        self._end_if_signalled(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the previous handlers."""
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the previous handlers, unless a signal is the cause: another one must not interrupt saving.

        After an error, no process that Lightning has started outlives the first: one that hangs would hold its memory.
        """
        if isinstance(exception, SIGTERMException):
            return
        self._restore_handlers()
        if isinstance(launcher := trainer.strategy.launcher, _SubprocessScriptLauncher):
            atexit.register(launcher.kill, signal.SIGKILL)

    def _end_if_signalled(self, trainer: Trainer) -> None:
        if not self._previous or not trainer.strategy.reduce_boolean_decision(self._received > 0, all=False):
            return
        received = torch.tensor(self._received, device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(received, reduce_op="max"))
        rank_zero_info(f"received {signal.Signals(number).name}; training ends at step {trainer.global_step}")
        environment = getattr(trainer.strategy, "cluster_environment", None)
        started_by_lightning = isinstance(environment, LightningEnvironment) and environment.local_rank() > 0
        # When a process that Lightning started ends with an error, Lightning kills the first one, which may still be saving.
        raise SIGTERMException(0 if started_by_lightning else 128 + number)

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
