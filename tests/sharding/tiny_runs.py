"""Short runs in processes of their own: of a tiny model by `train_tiny.py`, and of the command line."""

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.preloaded import with_package
from tests.processes import ROOT, TIMEOUT, clean_environment, run_isolated

STRATEGIES = ["fsdp2", "deepspeed_stage_3"]
ALL_NETWORKS = ["--aligned", "--ema", "--checkpointing"]
"""Options of a run with student, critic and EMA."""
SEVERAL_RUNS = pytest.mark.timeout(6 * TIMEOUT)
"""Time limit of a test of several runs; each run also has a time limit of its own."""


def train(out: Path, pretrained: str, *arguments: str) -> dict[str, Tensor]:
    """Run `train_tiny.py`, and return the final weights of all networks by name.

    Args:
        out: Directory of the run, which must not exist.
        pretrained: Directory of the teacher.
        arguments: Further options of the script.
    """
    out.mkdir(parents=True)
    processes = int(arguments[arguments.index("--devices") + 1]) if "--devices" in arguments else 1
    script = ROOT / "tests" / "sharding" / "train_tiny.py"
    with_package().run([script, out, "--pretrained", pretrained, *arguments], out, processes=processes)
    weights: dict[str, Tensor] = torch.load(out / "weights.pt")
    return weights


def run_command_line(directory: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `lightning-distill` in a directory, from which modules can be imported."""
    environment = clean_environment(directory)
    return run_isolated(["-m", "lightning_distill", *arguments], directory, environment=environment, check=check)


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest absolute difference of two sets of weights with equal names."""
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)
