import os
import signal

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_distill.callbacks.checkpoint import AtomicCheckpoint
from lightning_distill.callbacks.termination import JointTermination
from lightning_distill.data import ShapesData
from tests.toy import ToyModule


class SendSignals(Callback):
    """Sends signals to this process in a training step or a validation step."""

    def __init__(self, *sent: signal.Signals, step: int = 3, validation: bool = False) -> None:
        self.sent, self.step, self.validation = sent, step, validation

    def _send(self, trainer) -> None:
        if trainer.global_step == self.step:
            for number in self.sent:
                os.kill(os.getpid(), number)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.validation:
            self._send(trainer)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.validation:
            self._send(trainer)


@pytest.fixture(autouse=True)
def _interrupts_are_not_ignored():
    """Undo what a shell does for processes in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def fit(directory, *callbacks, **settings) -> Trainer:
    trainer = Trainer(
        max_steps=6,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[JointTermination(), AtomicCheckpoint(str(directory), every_n_train_steps=100), *callbacks],
        **settings,
    )
    trainer.fit(ToyModule(), ShapesData(size=16, batch_size=8, prompts_per_category=1))
    return trainer


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]
)
def test_signal_ends_the_run_with_a_checkpoint_of_its_step(tmp_path, sent, code):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)}
    with pytest.raises(SIGTERMException) as end:
        fit(tmp_path, SendSignals(sent), limit_val_batches=0)
    assert end.value.code == code
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    assert {number: signal.getsignal(number) for number in before} == before


def test_signal_in_validation_ends_the_run(tmp_path):
    with pytest.raises(SIGTERMException):
        fit(tmp_path, SendSignals(signal.SIGINT, step=2, validation=True), val_check_interval=2, check_val_every_n_epoch=None)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_second_interrupt_ends_at_once(tmp_path, monkeypatch):
    class EndedError(Exception):
        pass

    def end(code: int) -> None:
        raise EndedError(code)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(EndedError, match="130"):
        fit(tmp_path, SendSignals(signal.SIGINT, signal.SIGINT), limit_val_batches=0)
    assert not list(tmp_path.iterdir())


def test_second_signal_does_not_interrupt_saving(tmp_path, monkeypatch):
    save = torch.save

    def signalled_save(checkpoint, file):
        os.kill(os.getpid(), signal.SIGTERM)
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", signalled_save)
    with pytest.raises(SIGTERMException):
        fit(tmp_path, SendSignals(signal.SIGTERM), limit_val_batches=0)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_ignored_signals_and_handlers_of_others_stay(tmp_path, number):
    received = []
    for handler in (signal.SIG_IGN, lambda number, frame: received.append(number)):
        previous = signal.signal(number, handler)
        try:
            trainer = fit(tmp_path, SendSignals(number), limit_val_batches=0)
        finally:
            signal.signal(number, previous)
        assert trainer.global_step == 6
    assert received == [number]


def test_lost_terminal_does_not_prevent_the_checkpoint(tmp_path, monkeypatch):
    """A write to a closed terminal fails; here its descriptor is replaced in time."""
    main, terminal = os.openpty()
    previous = os.dup(2)
    os.dup2(terminal, 2)
    os.close(terminal)

    class Hangup(SendSignals):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == self.step:
                os.close(main)
                os.kill(os.getpid(), signal.SIGHUP)
                os.write(2, b"progress\n")

    try:
        with pytest.raises(SIGTERMException):
            fit(tmp_path, Hangup(), limit_val_batches=0)
    finally:
        os.dup2(previous, 2)
        os.close(previous)
    assert (tmp_path / "last.ckpt").exists()
