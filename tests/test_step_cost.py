"""Benchmarks of the training step: equal gradients of the compared steps, and runs of the scripts."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def step_cost() -> ModuleType:
    spec = importlib.util.spec_from_file_location("step_cost", BENCHMARKS / "step_cost.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["step_cost"] = module  # its dataclass looks up its module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_pass_has_the_gradients_of_two_with_fewer_multiplications(step_cost: ModuleType, checkpointing: bool) -> None:
    setting = step_cost.build("small", 64, "cpu")
    with torch.no_grad():
        for parameter in setting.network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)  # the interval input has no effect at its initialisation

    def gradient(variant: str) -> Tensor:
        setting.network.zero_grad()
        step_cost.loss(setting, variant).backward()
        return torch.cat([parameter.grad.flatten() for parameter in setting.network.parameters()])

    step_cost.prepare(setting, False)
    reference, plain = gradient("A"), gradient("D")
    assert step_cost.forwards(setting, "A") > 5.9
    step_cost.prepare(setting, checkpointing)
    assert (gradient("C") - reference).norm() / reference.norm() < 1e-5
    assert (plain - reference).norm() / reference.norm() > 0.1
    assert step_cost.forwards(setting, "C") < (5.3 if checkpointing else 4.3)


def run(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(BENCHMARKS / script), "--rounds", "1", *arguments], check=True, timeout=250)


@pytest.mark.slow
def test_step_cost_writes_a_row_per_variant(tmp_path: Path) -> None:
    run("step_cost.py", "--models", "small", "--tokens", "64", "--machine", "here", "--out", str(tmp_path))
    rows = json.loads((tmp_path / "step_cost_here.json").read_text())
    assert [row["variant"] for row in rows] == ["A", "B", "C", "C", "D", "D", "E"]
    assert all(row["peak_mib"] > 0 and row["seconds"] > 0 for row in rows)
    assert rows[0]["seconds_over_A"] == rows[0]["memory_over_A"] == 1
    assert {"model", "tokens", "checkpointing", "forwards"} <= set(rows[0])
    assert (tmp_path / "step_cost_here.png").stat().st_size > 0


@pytest.mark.slow
def test_training_step_writes_ratios_to_flow_matching(tmp_path: Path) -> None:
    run("training_step.py", "--tokens", "16", "--batch", "4", "--machine", "here", "--out", str(tmp_path))
    rows = json.loads((tmp_path / "training_step_here.json").read_text())["rows"]
    assert rows[0]["over_flow_matching"] == 1
    assert len(rows) == 4
