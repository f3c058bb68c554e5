"""Runs of the fault campaign: a short training, commands in forked or new processes, and what they print."""

import json
import multiprocessing
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

ROOT = Path(__file__).resolve().parents[1]
STEPS = 14
TIMEOUT = 300.0
"""Seconds after which a command counts as hanging."""
UNHANDLED = "Traceback (most recent call last)"


class RecordLosses(Callback):
    """Appends a line per step with its number and its loss to `losses.jsonl`, on the first process.

    Args:
        file: The file.
    """

    def __init__(self, file: str = "losses.jsonl") -> None:
        self.file = file

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the line at once, so that a killed process leaves the lines of its complete steps."""
        loss = float(trainer.callback_metrics["train/loss"])
        if trainer.is_global_zero:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": trainer.global_step, "loss": loss.hex()}) + "\n")


def write_config(directory: Path, processes: int = 1, strategy: str = "auto") -> None:
    """Write `run.yaml`: a training of 14 steps on the embedded teacher, with the switch, alignment and a critic.

    Args:
        directory: Directory of the file.
        processes: Processes of the training.
        strategy: Strategy of the trainer.
    """
    alignment = {"class_path": "TrajectoryAlignment", "init_args": {"start_step": 4, "critic_warmup_steps": 2, "nfe": [1, 2]}}
    config = {
        "base": "shapes_student.yaml",
        "model": {
            "class_path": "MeanFlow",
            "init_args": {
                "student": {"max_drift": 10.0},
                "solution": "bootstrapped",
                "alignment": alignment,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}},
                "lr_scheduler": {"class_path": "WarmupCosine", "init_args": {"total_steps": STEPS, "warmup_steps": 2}},
                "ema_decay": 0.9,
                "validation": {"nfe": [1], "teacher_nfe": 1, "solver_steps": 1},
            },
        },
        "data": {
            "class_path": "ShapesData",
            "init_args": {"size": 20, "batch_size": 4 // processes, "prompts_per_category": 1},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": processes,
            "strategy": strategy,
            "max_steps": STEPS,
            "val_check_interval": 5,
            "log_every_n_steps": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": "run",
            "callbacks": [
                {
                    "class_path": "AtomicCheckpoint",
                    "init_args": {"dirpath": "${trainer.default_root_dir}/checkpoints", "every_n_train_steps": 2},
                },
                {"class_path": "SwitchSolution", "init_args": {"latest_step": 10, "guard_factor": 1000.0}},
                {"class_path": "fault_runs.RecordLosses"},
                {
                    "class_path": "ExportPipeline",
                    "init_args": {"directory": "${trainer.default_root_dir}/student", "formats": ["any_step"]},
                },
            ],
        },
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run.yaml").write_text(yaml.safe_dump(config))


def losses(directory: Path) -> list[tuple[int, str]]:
    """Steps and losses that trainings in a directory have recorded, in order."""
    file = directory / "losses.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


@dataclass(frozen=True)
class Finished:
    """A command that has ended.

    Attributes:
        code: Exit code; negative after a signal; None if it exceeded its time and was killed.
        output: Joint output of its processes.
        seconds: Duration.
    """

    code: int | None
    output: str
    seconds: float

    @property
    def refused(self) -> bool:
        """Whether it ended with one line that begins with `error:`, and without a traceback."""
        return self.code in (1, 2) and UNHANDLED not in self.output and bool(re.search(r"(?m)^error: \S", self.output))

    @property
    def last_line(self) -> str:
        """Last line of its output that is not empty."""
        return next((line for line in reversed(self.output.splitlines()) if line.strip()), "")


class Command:
    """`lightning-distill ARGUMENTS`, started in a directory.

    A command of one process is a fork of this one, which has imported the package; several processes need an interpreter.

    Args:
        directory: Working directory.
        arguments: Arguments of the command.
        fork: Whether it is a fork.
    """

    def __init__(self, directory: Path, arguments: Sequence[str], fork: bool = True) -> None:
        self.log = directory / f"command-{len(list(directory.glob('command-*.log')))}.log"
        self.start = time.monotonic()
        self._process: Any
        if fork:
            self._process = multiprocessing.get_context("fork").Process(target=_become, args=(directory, self.log, arguments))
            self._process.start()
        else:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))}
            with self.log.open("wb") as file:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "lightning_distill", *arguments],
                    cwd=directory,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

    @property
    def running(self) -> bool:
        """Whether its first process runs."""
        return self._exit_code() is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal: SIGKILL to all of its processes, another signal to the first."""
        if not self.running:
            return
        if number == signal.SIGKILL and isinstance(self._process, subprocess.Popen):
            os.killpg(self._process.pid, number)
        else:
            os.kill(self._process.pid, number)

    def wait(self, timeout: float = TIMEOUT) -> Finished:
        """Wait for its end; it is killed after `timeout` seconds."""
        end = time.monotonic() + timeout
        while self.running and time.monotonic() < end:
            time.sleep(0.01)
        code = self._exit_code()
        if code is None:
            self.send(signal.SIGKILL)
        if isinstance(self._process, subprocess.Popen):
            self._process.wait()
        else:
            self._process.join()
        return Finished(code, self.log.read_text(errors="replace"), time.monotonic() - self.start)

    def _exit_code(self) -> int | None:
        code: int | None
        code = self._process.poll() if isinstance(self._process, subprocess.Popen) else self._process.exitcode
        return code


def run(directory: Path, *arguments: str, fork: bool = True) -> Finished:
    """Run a command to its end."""
    return Command(directory, arguments, fork).wait()


def _become(directory: Path, log: Path, arguments: Sequence[str]) -> None:
    os.chdir(directory)
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["lightning-distill", *arguments]
    runpy.run_module("lightning_distill", run_name="__main__", alter_sys=True)


def preload() -> None:
    """Import what commands import, so that forks start at once."""
    import lightning_distill.commands.sample
    import lightning_distill.commands.training  # noqa: F401


def flip_bit(content: bytes, generator: random.Random) -> bytes:
    """The content with one random bit changed."""
    changed = bytearray(content)
    changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def cut(content: bytes, generator: random.Random) -> bytes:
    """A random beginning of the content, shorter than the whole."""
    return content[: generator.randrange(len(content))]


def pick(files: Sequence[Path], generator: random.Random) -> Path:
    """A random file, with a probability proportional to its size."""
    return generator.choices(files, [file.stat().st_size for file in files])[0]
