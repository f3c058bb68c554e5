"""A MeanFlow run that is killed within an epoch and resumed has the losses of the uninterrupted run."""

import signal
from pathlib import Path

import pytest
import yaml

from tests.preloaded import with_package
from tests.processes import clean_environment
from tests.tiny import save_tiny_pipeline

KILLER = """
import os, signal
from lightning.pytorch import Callback

class KillAt(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with open("losses.txt", "a") as file:
            file.write(f"{trainer.global_step} {float(outputs['loss'])!r}\\n")
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
"""
STEPS, KILL = 14, 8  # 5 batches per epoch; the switch is at step 6


def settings(directory: Path) -> dict:
    return {
        "base": "shapes_student.yaml",
        "model": {
            "class_path": "MeanFlow",
            "init_args": {
                "adapter": {"init_args": {"pretrained": str(directory / "teacher")}},
                "student": {"max_drift": 10.0},
                "solution": "bootstrapped",
                "tangent_warmup_steps": 4,
                "ema_decay": 0.9,
                "alignment": {"class_path": "TrajectoryAlignment", "init_args": {"start_step": 3}},
                "optimizer": {"class_path": "MuonWithAdamW", "init_args": {"lr": 1e-3}},
                "lr_scheduler": {"class_path": "WarmupCosine", "init_args": {"total_steps": STEPS, "warmup_steps": 2}},
                "metric": None,
                "validation": {"nfe": [1], "samples": 4, "solver_steps": 1},
            },
        },
        "data": {"init_args": {"size": 20, "batch_size": 4, "prompts_per_category": 1}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "val_check_interval": 4,
            "logger": False,
            "enable_progress_bar": False,
            "default_root_dir": "run",
            "callbacks": [
                {
                    "class_path": "AtomicCheckpoint",
                    "init_args": {
                        "dirpath": "run/checkpoints",
                        "every_n_train_steps": 1,
                        "save_last": True,
                    },
                },
                {"class_path": "SwitchSolution", "init_args": {"latest_step": 6, "guard_factor": 1000.0}},
                {"class_path": "killer.KillAt", "init_args": {"step": -1}},
            ],
        },
    }


def run(folder: Path, config: dict, *arguments: str) -> int:
    folder.mkdir(exist_ok=True)
    (folder / "killer.py").write_text(KILLER)
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    command = ["-m", "lightning_distill", "fit", "--config", "run.yaml", *arguments]
    return with_package().run(command, folder, environment=clean_environment(folder), check=False).returncode


def losses(folder: Path) -> dict[int, str]:
    return dict(line.split() for line in (folder / "losses.txt").read_text().splitlines())  # type: ignore[misc]


@pytest.mark.timeout(600)
def test_resumed_run_has_the_losses_of_the_uninterrupted_run(tmp_path: Path) -> None:
    save_tiny_pipeline(tmp_path / "teacher")
    config = settings(tmp_path)
    assert run(tmp_path / "uninterrupted", config) == 0

    config["trainer"]["callbacks"][-1]["init_args"]["step"] = KILL
    assert run(tmp_path / "killed", config) == -signal.SIGKILL
    config["trainer"]["callbacks"][-1]["init_args"]["step"] = -1
    assert run(tmp_path / "killed", config, "--ckpt_path", "last") == 0

    uninterrupted, killed = losses(tmp_path / "uninterrupted"), losses(tmp_path / "killed")
    assert len(uninterrupted) == STEPS
    assert killed == uninterrupted
