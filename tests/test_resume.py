"""A resumed run repeats the interrupted one, loss for loss."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_distill.callbacks.checkpoint import AtomicCheckpoint
from lightning_distill.callbacks.random_state import RandomState
from lightning_distill.commands.main import main
from lightning_distill.data import ShapesData
from tests.toy import ManualToyModule, ToyModule, read_losses

STEPS_PER_EPOCH = 5
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


def fit(
    directory: Path,
    name: str,
    ckpt_path: str | None = None,
    *,
    num_workers: int = 0,
    every: int | None = 1,
    callbacks: tuple[type[Callback], ...] = (RandomState,),
    module: type[ToyModule] = ToyModule,
    **kwargs: Any,
) -> list[tuple[int, float, list[int]]]:
    """Train three epochs of five steps with a checkpoint after `every` step, or epoch, and return what each step saw."""
    seed_everything(1 if ckpt_path else 0)  # another seed on resume: what is equal afterwards was restored
    losses = directory / f"{name}.jsonl"
    checkpoint = AtomicCheckpoint(str(directory / name), filename="{step}", save_top_k=-1, every_n_train_steps=every)
    settings = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False} | kwargs
    trainer = Trainer(callbacks=[checkpoint, *(kind() for kind in callbacks)], enable_model_summary=False, **settings)
    data = ShapesData(size=44, batch_size=8, prompts_per_category=1, num_workers=num_workers)
    trainer.fit(module(losses=str(losses)), data, ckpt_path=ckpt_path)
    return read_losses(losses)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return directory, fit(directory, "whole", val_check_interval=2)


def test_every_epoch_has_an_order_of_its_own(whole):
    _, seen = whole
    assert [step for step, _, _ in seen] == list(range(3 * STEPS_PER_EPOCH))
    epochs = [[i for _, _, indices in seen[k : k + STEPS_PER_EPOCH] for i in indices] for k in (0, 5, 10)]
    assert all(len(set(epoch)) == 40 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("step", range(1, 3 * STEPS_PER_EPOCH))
def test_resume_is_exact_after_every_step(whole, tmp_path, step):
    directory, seen = whole
    resumed = fit(tmp_path, "resumed", str(directory / "whole" / f"step={step}.ckpt"), val_check_interval=2)
    assert resumed == seen[step:]


@pytest.mark.parametrize("step", [3, 5, 8])
def test_resume_is_exact_with_workers_and_by_steps(tmp_path, step):
    settings = {"num_workers": 2, "max_epochs": -1, "max_steps": 12}
    seen = fit(tmp_path, "whole", **settings)
    resumed = fit(tmp_path, "resumed", str(tmp_path / "whole" / f"step={step}.ckpt"), **settings)
    assert len(seen) == 12
    assert resumed == seen[step:]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resume_is_exact_from_the_end_of_an_epoch(tmp_path, num_workers):
    seen = fit(tmp_path, "whole", every=None, num_workers=num_workers)
    resumed = fit(tmp_path, "resumed", str(tmp_path / "whole" / "step=5.ckpt"), every=None, num_workers=num_workers)
    assert resumed == seen[STEPS_PER_EPOCH:]


def test_resume_is_exact_under_accumulation(tmp_path):
    seen = fit(tmp_path, "whole", accumulate_grad_batches=2)
    resumed = fit(tmp_path, "resumed", str(tmp_path / "whole" / "step=4.ckpt"), accumulate_grad_batches=2)
    assert resumed == seen[7:]  # steps of batches 2, 2, 1, 2 and so on: an epoch's last step takes what is left


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_resume_is_exact_under_manual_optimization(tmp_path):
    seen = fit(tmp_path, "whole", module=ManualToyModule)
    resumed = fit(tmp_path, "resumed", str(tmp_path / "whole" / "step=7.ckpt"), module=ManualToyModule)
    assert resumed == seen[7:]


def test_without_the_callback_the_losses_differ(whole, tmp_path):
    directory, seen = whole
    resumed = fit(tmp_path, "resumed", str(directory / "whole" / "step=7.ckpt"), callbacks=())
    assert [indices for _, _, indices in resumed] == [indices for _, _, indices in seen[7:]]
    assert all(loss != expected for (_, loss, _), (_, expected, _) in zip(resumed, seen[7:], strict=True))


def test_how_often_validation_runs_changes_nothing(whole, tmp_path):
    _, seen = whole
    assert fit(tmp_path, "rare", limit_val_batches=0) == seen


def command(directory: Path, *further: str) -> list[str]:
    """Arguments of a run of 15 steps that saves every second one."""
    return [
        *("fit", "--trainer.max_epochs=3", "--trainer.accelerator=cpu", "--trainer.logger=false"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.val_check_interval=3"),
        *("--trainer.callbacks=AtomicCheckpoint", "--trainer.callbacks.every_n_train_steps=2"),
        f"--trainer.callbacks.dirpath={directory}",
        *("--model=tests.toy.ToyModule", f"--model.losses={directory / 'losses.jsonl'}"),
        *("--data=ShapesData", "--data.size=44", "--data.batch_size=8", "--data.prompts_per_category=1"),
        *further,
    ]


def interrupt(arguments: list[str], losses: Path, after: int, sent: signal.Signals, whole_group: bool = False) -> int:
    """Run a command in a process of its own, send it a signal once it has trained some steps, and return its exit code.

    Args:
        arguments: Of the command.
        losses: File of a line a step and process.
        after: How many lines to wait for.
        sent: The signal.
        whole_group: Whether processes that the command has started get it too.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_distill", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not losses.exists() or len(losses.read_text().splitlines()) < after:
            assert process.poll() is None, "the run ended before it was interrupted"
            assert time.monotonic() < deadline, "the run did not start"
            time.sleep(0.02)
        if whole_group:
            os.killpg(process.pid, sent)
        else:
            process.send_signal(sent)
        return process.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:.*has other model settings")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_resume_is_exact_after_a_signal(tmp_path, sent, code):
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    for directory in (whole, interrupted):
        directory.mkdir()
    main(command(whole))
    seen = read_losses(whole / "losses.jsonl")
    assert interrupt(command(interrupted, "--model.pause=0.3"), interrupted / "losses.jsonl", 8, sent) == code
    before = read_losses(interrupted / "losses.jsonl")
    assert 8 <= len(before) < 15
    assert before == seen[: len(before)]
    (interrupted / "losses.jsonl").unlink()
    main(command(interrupted, "--ckpt_path=last", "--seed_everything=5"))
    after = read_losses(interrupted / "losses.jsonl")
    assert after == seen[-len(after) :]
    if sent == signal.SIGTERM:  # saved at the signal, not at the last multiple of two
        assert len(before) + len(after) == 15
    else:
        assert 15 <= len(before) + len(after) <= 17


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [False, True], ids=["first process", "all processes"])
def test_two_processes_end_together_at_sigterm_and_resume(tmp_path, whole_group):
    """A scheduler signals every process of a job, `kill` the first alone."""
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4", "--trainer.log_every_n_steps=1"]
    arguments = command(tmp_path, *ddp, "--trainer.callbacks.every_n_train_steps=100")  # nothing but the signal saves
    losses = tmp_path / "losses.jsonl"
    assert interrupt([*arguments, "--model.pause=0.2"], losses, 8, signal.SIGTERM, whole_group) == 143
    before = len(losses.read_text().splitlines())
    assert 8 <= before < 30
    losses.unlink()
    resumed = [*arguments, "--ckpt_path=last"]
    subprocess.run([sys.executable, "-m", "lightning_distill", *resumed], cwd=ROOT, check=True, capture_output=True)
    assert before + len(losses.read_text().splitlines()) == 30


@pytest.mark.slow
def test_resume_is_exact_on_two_processes(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4"]
    for directory, further in ((whole, []), (resumed, [f"--ckpt_path={whole / 'epoch=1-step=8.ckpt'}", "--seed_everything=5"])):
        directory.mkdir()
        arguments = command(directory, *ddp, "--trainer.callbacks.save_top_k=-1", *further)
        subprocess.run([sys.executable, "-m", "lightning_distill", *arguments], cwd=ROOT, check=True, capture_output=True)
    lines = [json.loads(line) for line in (whole / "losses.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in (resumed / "losses.jsonl").read_text().splitlines()]
    for epoch in range(3):
        indices = [i for line in lines if line["step"] // 5 == epoch for i in line["index"]]
        assert len(indices) == len(set(indices)) == 40
    for rank in (0, 1):
        expected = [line for line in lines if line["rank"] == rank and line["step"] >= 8]
        assert [line for line in again if line["rank"] == rank] == expected
        assert len(expected) == 7
