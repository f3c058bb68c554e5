"""Every method under strategies that spread networks: processes whose draws differ call them equally often."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import save_tiny_pipeline

ROOT = Path(__file__).resolve().parents[2]
METHODS = ["ConsistencyDistillation", "IMM", "KnowledgeDistillation", "PiFlow", "SCM", "SplitMeanFlow", "TimestepRescaling"]

SCRIPT = """
import sys
import torch
from lightning import Trainer, seed_everything
from torch.utils.data import DataLoader
import lightning_distill.sharding
from lightning_distill import methods
from lightning_distill.teachers import DiffusersAdapter
from lightning_distill.teachers.student_options import StudentOptions
from tests.sharding.train_tiny import data

name, pretrained, strategy = sys.argv[1:]
seed_everything(0)
# One sample or group a process, so that which networks it takes is drawn anew in each step and process.
settings, batch_size = {
    "ConsistencyDistillation": ({"target": "ema", "ema_decay": 0.9}, 1),
    "IMM": ({"particles": 2}, 2),
    "KnowledgeDistillation": ({"nfe": (1, 3), "solver_steps": 1}, 1),
    "PiFlow": ({"nfe": (1, 3), "trajectory_fraction": 0.5, "student": StudentOptions(max_drift=1.0, policy_points=3)}, 1),
    "SCM": ({}, 1),
    "SplitMeanFlow": ({"equal_fraction": 0.5}, 1),
    "TimestepRescaling": ({"student": StudentOptions(time_embedding="rescaled"), "ema_decay": 0.9}, 1),
}[name]
adapter = DiffusersAdapter(pretrained)
adapter.check()
module = getattr(methods, name)(
    adapter, guidance=methods.Guidance("two_branch", 2.0), optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
    **{"student": StudentOptions(max_drift=1.0), **settings},
)
trainer = Trainer(
    max_steps=6, accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_progress_bar=False,
    enable_model_summary=False, enable_checkpointing=False,
)
trainer.fit(module, DataLoader(data(), batch_size=batch_size))
assert trainer.global_step == 6
weights = module.sharding.gather(module.student)
assert all(torch.isfinite(value).all() for value in weights.values())
if name == "SCM":  # whose learned weight trains beside the student
    learned = module.sharding.gather(module.time_weight)
    assert trainer.is_global_zero == bool(learned)
    assert all(value.any() for value in learned.values())
"""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_pipeline(tmp_path_factory.mktemp("teacher"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_stage_3"])
@pytest.mark.parametrize("name", METHODS)
def test_processes_do_not_wait_for_each_other(name: str, strategy: str, pretrained: str, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), name, pretrained, strategy]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
