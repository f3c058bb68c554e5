"""Training runs of the benchmarks: modified settings of shipped configs, `fit` in a subprocess, and logged curves."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEP_SETTINGS = {
    "max_steps",
    "total_steps",
    "warmup_steps",
    "hold_steps",
    "val_check_interval",
    "earliest_step",
    "latest_step",
    "start_step",
    "critic_warmup_steps",
    "tangent_warmup_steps",
}
"""Names of settings that are numbers of optimizer steps; a longer or shorter run scales them."""


def full_config(name: str) -> dict[str, Any]:
    """All settings of a shipped config, as the command line prints them."""
    command = [sys.executable, "-m", "lightning_distill", "fit", "--config", name, "--print_config"]
    settings: dict[str, Any] = yaml.safe_load(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return settings


def scale_steps(value: Any, factor: float) -> Any:
    """Settings with all numbers of optimizer steps multiplied by a factor. Positive numbers remain at least 1."""
    if isinstance(value, list):
        return [scale_steps(each, factor) for each in value]
    if not isinstance(value, dict):
        return value

    def new(name: str, each: Any) -> Any:
        if name in STEP_SETTINGS and isinstance(each, int) and not isinstance(each, bool):
            return max(1, round(factor * each)) if each else each
        return scale_steps(each, factor)

    return {name: new(name, each) for name, each in value.items()}


def run_config(settings: dict[str, Any], seed: int, directory: Path, keep: Callable[[str], bool]) -> dict[str, Any]:
    """Settings of a run.

    Args:
        settings: Settings of a config.
        seed: Seed of the run.
        directory: Output directory of the run.
        keep: Function from the class name of a callback to whether the run has it.
    """
    settings = copy.deepcopy(settings)
    settings["seed_everything"] = settings["data"]["init_args"]["seed"] = seed
    trainer = settings["trainer"]
    trainer["default_root_dir"] = str(directory)
    trainer["callbacks"] = [each for each in trainer["callbacks"] if keep(each["class_path"].rsplit(".", 1)[-1])]
    for callback in trainer["callbacks"]:
        if callback["class_path"].endswith("ExportPipeline"):
            callback["init_args"]["directory"] = str(directory / "student")
    trainer |= {"enable_checkpointing": False, "enable_progress_bar": False}
    return settings


def single_process(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the same run in one process, with the batch of all processes."""
    settings = copy.deepcopy(settings)
    settings["data"]["init_args"]["batch_size"] *= int(settings["trainer"]["devices"])
    settings["trainer"] |= {"devices": 1, "strategy": "auto"}
    return settings


def train(settings: dict[str, Any], directory: Path, threads: int | None = None) -> None:
    """Run `fit` in a subprocess.

    Args:
        settings: Settings of the run.
        directory: Directory of the run, with its config and log; what an interrupted run has left there is deleted.
        threads: Number of threads. None: as in the environment.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "lightning_distill", "fit", "--config", str(directory / "config.yaml")]
    with (directory / "log.txt").open("w") as log:
        environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)


def events(directory: Path) -> EventAccumulator:
    """TensorBoard data of a run."""
    return EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
