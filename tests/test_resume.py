"""A resumed run has the losses of the uninterrupted run."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

from lightning_distill.callbacks.checkpoint import AtomicCheckpoint
from lightning_distill.callbacks.data_position import DataPosition
from lightning_distill.callbacks.random_state import RandomState
from lightning_distill.commands.main import main
from lightning_distill.data import ShapesData
from lightning_distill.data.epoch_sampler import EpochSampler
from tests.preloaded import with_package
from tests.processes import ROOT
from tests.toy import ManualToyModule, ToyModule, read_losses

STEPS_PER_EPOCH = 5
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


def fit(
    directory: Path,
    name: str,
    ckpt_path: str | None = None,
    *,
    num_workers: int = 0,
    size: int = 44,
    batch_size: int = 8,
    every: int | None = 1,
    callbacks: tuple[type[Callback], ...] = (RandomState,),
    module: type[ToyModule] = ToyModule,
    **kwargs: Any,
) -> list[tuple[int, float, list[int]]]:
    """Train three epochs of five steps, and return step, loss and batch indices of each step.

    Checkpoints are saved after `every` steps, or after every epoch if it is None.
    """
    seed_everything(1 if ckpt_path else 0)  # another seed on resume, so that only restored states can give equal losses
    losses = directory / f"{name}.jsonl"
    checkpoint = AtomicCheckpoint(str(directory / name), filename="{step}", save_top_k=-1, every_n_train_steps=every)
    settings = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False} | kwargs
    trainer = Trainer(callbacks=[checkpoint, *(kind() for kind in callbacks)], enable_model_summary=False, **settings)
    data = ShapesData(size=size, batch_size=batch_size, prompts_per_category=1, num_workers=num_workers)
    trainer.fit(module(losses=str(losses)), data, ckpt_path=ckpt_path)
    return read_losses(losses)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    return directory, fit(directory, "uninterrupted", val_check_interval=2)


def test_every_epoch_has_a_different_order(uninterrupted):
    _, expected = uninterrupted
    assert [step for step, _, _ in expected] == list(range(3 * STEPS_PER_EPOCH))
    epochs = [[i for _, _, indices in expected[k : k + STEPS_PER_EPOCH] for i in indices] for k in (0, 5, 10)]
    assert all(len(set(epoch)) == 40 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("step", range(1, 3 * STEPS_PER_EPOCH))
def test_resume_is_exact_after_every_step(uninterrupted, tmp_path, step):
    directory, expected = uninterrupted
    resumed = fit(tmp_path, "resumed", str(directory / "uninterrupted" / f"step={step}.ckpt"), val_check_interval=2)
    assert resumed == expected[step:]


@pytest.mark.parametrize("step", [3, 5, 8])
def test_resume_is_exact_with_workers_and_max_steps(tmp_path, step):
    settings = {"num_workers": 2, "max_epochs": -1, "max_steps": 12}
    expected = fit(tmp_path, "uninterrupted", **settings)
    resumed = fit(tmp_path, "resumed", str(tmp_path / "uninterrupted" / f"step={step}.ckpt"), **settings)
    assert len(expected) == 12
    assert resumed == expected[step:]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resume_is_exact_from_the_end_of_an_epoch(tmp_path, num_workers):
    expected = fit(tmp_path, "uninterrupted", every=None, num_workers=num_workers)
    checkpoint = str(tmp_path / "uninterrupted" / "step=5.ckpt")
    resumed = fit(tmp_path, "resumed", checkpoint, every=None, num_workers=num_workers)
    assert resumed == expected[STEPS_PER_EPOCH:]


@pytest.mark.parametrize("limits", [{}, {"max_epochs": -1, "max_steps": 20}], ids=["epochs", "steps"])
@pytest.mark.parametrize(("step", "batch_size"), [(4, 4), (4, 40), (5, 4), (7, 12)])
def test_another_batch_size_continues_the_epoch_without_repeats(uninterrupted, tmp_path, step, batch_size, limits):
    directory, expected = uninterrupted
    checkpoint = str(directory / "uninterrupted" / f"step={step}.ckpt")
    resumed = fit(tmp_path, "resumed", checkpoint, batch_size=batch_size, val_check_interval=1, **limits)
    epoch = step // STEPS_PER_EPOCH
    before = [i for _, _, indices in expected[epoch * STEPS_PER_EPOCH : step] for i in indices]
    remaining = (44 - len(before)) // batch_size  # steps of this epoch
    rest = [i for _, _, indices in resumed[:remaining] for i in indices]
    assert len({*before, *rest}) == len(before) + remaining * batch_size
    steps = 44 // batch_size
    assert len(resumed) == (20 - step if limits else remaining + (2 - epoch) * steps)
    for start in range(remaining, len(resumed), steps):
        indices = [i for _, _, indices in resumed[start : start + steps] for i in indices]
        assert len(indices) == len(set(indices)) == batch_size * min(steps, len(resumed) - start)
    following = [i for _, _, indices in resumed[remaining : remaining + steps] for i in indices]
    sampler = EpochSampler(range(44), batch_size)
    assert following == sampler.indices(epoch + 1)[: len(following)]


@pytest.mark.parametrize(("step", "size"), [(4, 8), (5, 8), (7, 60)])
def test_other_data_continues_with_a_warning(uninterrupted, tmp_path, step, size):
    directory, _ = uninterrupted
    checkpoint = str(directory / "uninterrupted" / f"step={step}.ckpt")
    within = step % STEPS_PER_EPOCH > 0
    with pytest.warns(UserWarning, match=rf"{size} samples \(checkpoint: 44\)") if within else contextlib.nullcontext():
        resumed = fit(tmp_path, "resumed", checkpoint, size=size, max_epochs=-1, max_steps=step + 10, val_check_interval=1)
    assert [found for found, _, _ in resumed] == list(range(step, step + 10))
    assert {i for _, _, indices in resumed for i in indices} <= set(range(size))


@pytest.mark.parametrize(("saved", "resumed"), [(0, 2), (2, 0), (2, 1)])
def test_another_number_of_workers_is_exact(tmp_path, saved, resumed):
    expected = fit(tmp_path, "uninterrupted", num_workers=saved)
    checkpoint = str(tmp_path / "uninterrupted" / "step=7.ckpt")
    assert fit(tmp_path, "resumed", checkpoint, num_workers=resumed) == expected[7:]


class PlainData(ShapesData):
    """Data without a position, as of another package."""

    def train_dataloader(self):
        return DataLoader(self.require_setup(self._train), batch_size=4, collate_fn=lambda batch: batch)


def test_data_that_cannot_restore_the_position_begins_an_epoch(uninterrupted, tmp_path, monkeypatch):
    directory, _ = uninterrupted
    monkeypatch.setattr("tests.test_resume.ShapesData", PlainData)
    monkeypatch.setattr("lightning_distill.callbacks.data_position.ResumableData", type(None))
    checkpoint = str(directory / "uninterrupted" / "step=7.ckpt")
    with pytest.warns(UserWarning, match="PlainData cannot restore the position in the checkpoint's data"):
        resumed = fit(tmp_path, "resumed", checkpoint, callbacks=(DataPosition,), max_epochs=-1, max_steps=9)
    assert [step for step, _, _ in resumed] == [7, 8]
    monkeypatch.undo()
    checkpoint = str(tmp_path / "resumed" / "step=8.ckpt")  # and back to data with a position
    resumed = fit(tmp_path, "again", checkpoint, max_epochs=-1, max_steps=20)
    assert [step for step, _, _ in resumed] == list(range(8, 20))


def test_limited_epochs_resume_exactly(tmp_path):
    limits = {"limit_train_batches": 3, "max_epochs": -1, "max_steps": 9}
    expected = fit(tmp_path, "uninterrupted", **limits)
    for step in (3, 4):
        checkpoint = str(tmp_path / "uninterrupted" / f"step={step}.ckpt")
        assert fit(tmp_path, f"resumed_{step}", checkpoint, **limits) == expected[step:]


def test_resume_is_exact_with_gradient_accumulation(tmp_path):
    expected = fit(tmp_path, "uninterrupted", accumulate_grad_batches=2)
    resumed = fit(tmp_path, "resumed", str(tmp_path / "uninterrupted" / "step=4.ckpt"), accumulate_grad_batches=2)
    assert resumed == expected[7:]  # batches per step are 2, 2, 1, 2, ...: the last step of an epoch has the remainder


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_resume_is_exact_with_manual_optimization(tmp_path):
    expected = fit(tmp_path, "uninterrupted", module=ManualToyModule)
    resumed = fit(tmp_path, "resumed", str(tmp_path / "uninterrupted" / "step=7.ckpt"), module=ManualToyModule)
    assert resumed == expected[7:]


def test_losses_differ_without_the_callback(uninterrupted, tmp_path):
    directory, expected = uninterrupted
    resumed = fit(tmp_path, "resumed", str(directory / "uninterrupted" / "step=7.ckpt"), callbacks=())
    assert [indices for _, _, indices in resumed] == [indices for _, _, indices in expected[7:]]
    assert all(loss != other for (_, loss, _), (_, other, _) in zip(resumed, expected[7:], strict=True))


def test_losses_do_not_depend_on_validation(uninterrupted, tmp_path):
    _, expected = uninterrupted
    assert fit(tmp_path, "without_validation", limit_val_batches=0) == expected


def command(directory: Path, *options: str) -> list[str]:
    """Arguments of a run of 15 steps with a checkpoint every two steps."""
    return [
        *("fit", "--trainer.max_epochs=3", "--trainer.accelerator=cpu", "--trainer.logger=false"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.val_check_interval=3"),
        *("--trainer.callbacks=AtomicCheckpoint", "--trainer.callbacks.every_n_train_steps=2"),
        *(f"--trainer.callbacks.dirpath={directory}", f"--trainer.default_root_dir={directory}"),
        *("--model=tests.toy.ToyModule", f"--model.losses={directory / 'losses.jsonl'}"),
        *("--data=ShapesData", "--data.size=44", "--data.batch_size=8", "--data.prompts_per_category=1"),
        *options,
    ]


def interrupt(arguments: list[str], losses: Path, after: int, sent: signal.Signals, process_group: bool = False) -> int:
    """Run a command in another process, send it a signal after some steps, and return its exit code.

    Args:
        arguments: Arguments of the command.
        losses: File with a line per step and process.
        after: Number of lines before the signal.
        sent: The signal.
        process_group: Whether the processes that Lightning starts receive the signal as well.
    """
    with with_package().start(["-m", "lightning_distill", *arguments], ROOT) as process:
        deadline = time.monotonic() + 120
        while not losses.exists() or len(losses.read_text().splitlines()) < after:
            assert process.wait(0) is None, "the run ended before it was interrupted"
            assert time.monotonic() < deadline, "the run did not start"
            time.sleep(0.02)
        if process_group:
            os.killpg(process.pid, sent)
        else:
            os.kill(process.pid, sent)
        code = process.wait(60)
    assert code is not None, "the run did not end"
    return code


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:.*has other settings")
@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (signal.SIGKILL, -signal.SIGKILL),
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.slow),
    ],
)
def test_resume_is_exact_after_a_signal(tmp_path, sent, code):
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    for directory in (uninterrupted, interrupted):
        directory.mkdir()
    main(command(uninterrupted))
    expected = read_losses(uninterrupted / "losses.jsonl")
    assert interrupt(command(interrupted, "--model.pause=0.3"), interrupted / "losses.jsonl", 8, sent) == code
    before = read_losses(interrupted / "losses.jsonl")
    assert 8 <= len(before) < 15
    assert before == expected[: len(before)]
    (interrupted / "losses.jsonl").unlink()
    main(command(interrupted, "--ckpt_path=last", "--seed_everything=5"))
    after = read_losses(interrupted / "losses.jsonl")
    assert after == expected[-len(after) :]
    if sent != signal.SIGKILL:  # the checkpoint is from the signal, not from the last multiple of two
        assert len(before) + len(after) == 15
    else:
        assert 15 <= len(before) + len(after) <= 17


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("process_group", [False, True], ids=["first process", "all processes"])
def test_two_processes_end_together_at_a_signal_and_resume(tmp_path, process_group, sent, code):
    """A cluster's scheduler and a terminal signal every process of a job; `kill` signals only the first process."""
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4", "--trainer.log_every_n_steps=1"]
    arguments = command(tmp_path, *ddp, "--trainer.callbacks.every_n_train_steps=100")  # so that only the signal saves
    losses = tmp_path / "losses.jsonl"
    assert interrupt([*arguments, "--model.pause=0.2"], losses, 8, sent, process_group) == code
    before = len(losses.read_text().splitlines())
    assert 8 <= before < 30
    losses.unlink()
    resumed = [*arguments, "--ckpt_path=last"]
    with_package().run(["-m", "lightning_distill", *resumed], ROOT, processes=2)
    assert before + len(losses.read_text().splitlines()) == 30


@pytest.mark.slow
def test_resume_is_exact_on_two_processes(tmp_path):
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4"]
    resume = [f"--ckpt_path={uninterrupted / 'epoch=1-step=8.ckpt'}", "--seed_everything=5"]
    for directory, options in ((uninterrupted, []), (resumed, resume)):
        directory.mkdir()
        arguments = command(directory, *ddp, "--trainer.callbacks.save_top_k=-1", *options)
        with_package().run(["-m", "lightning_distill", *arguments], ROOT, processes=2)
    lines = [json.loads(line) for line in (uninterrupted / "losses.jsonl").read_text().splitlines()]
    resumed_lines = [json.loads(line) for line in (resumed / "losses.jsonl").read_text().splitlines()]
    for epoch in range(3):
        indices = [i for line in lines if line["step"] // 5 == epoch for i in line["index"]]
        assert len(indices) == len(set(indices)) == 40
    for rank in (0, 1):
        expected = [line for line in lines if line["rank"] == rank and line["step"] >= 8]
        assert [line for line in resumed_lines if line["rank"] == rank] == expected
        assert len(expected) == 7


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "resumed"), [(1, 2), (2, 1)])
def test_another_number_of_processes_continues_the_epoch_without_repeats(tmp_path, saved, resumed):
    for processes, options in ((saved, ["--trainer.max_steps=4"]), (resumed, ["--ckpt_path=last", "--trainer.max_steps=11"])):
        strategy = [f"--trainer.devices={processes}", *(["--trainer.strategy=ddp"] if processes > 1 else [])]
        data = ["--data.batch_size=4", "--data.size=44", "--trainer.max_epochs=-1"]
        arguments = command(tmp_path, *strategy, *data, *options)
        with_package().run(["-m", "lightning_distill", *arguments], ROOT, processes=processes)
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * saved + 7 * resumed
    first = 4 + (44 - 16 * saved) // (4 * resumed)  # steps of the first epoch
    indices = [i for line in lines if line["step"] < first for i in line["index"]]
    assert len(indices) == len(set(indices)) > 44 - 4 * resumed
