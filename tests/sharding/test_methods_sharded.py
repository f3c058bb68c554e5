"""Every method with sharded networks: processes with different random numbers call each network equally often."""

from pathlib import Path

import pytest

from tests.preloaded import with_package

METHODS = ["ConsistencyDistillation", "IMM", "KnowledgeDistillation", "PiFlow", "SCM", "SplitMeanFlow", "TimestepRescaling"]

SCRIPT = """
import sys
import torch
from lightning import Trainer, seed_everything
from torch.utils.data import DataLoader
import lightning_distill.sharding.strategies
from lightning_distill import methods
from lightning_distill.teachers import DiffusersAdapter
from lightning_distill.teachers.student_options import StudentOptions
from tests.sharding.train_tiny import training_data

name, pretrained, strategy = sys.argv[1:]
seed_everything(0)
# One sample or group per process, so that each step and process samples which networks it calls.
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
trainer.fit(module, DataLoader(training_data(), batch_size=batch_size))
assert trainer.global_step == 6
weights = module.sharding.gather(module.student)
assert all(torch.isfinite(value).all() for value in weights.values())
if name == "SCM":  # its weighting network trains beside the student
    learned = module.sharding.gather(module.time_weight)
    assert trainer.is_global_zero == bool(learned)
    assert all(value.any() for value in learned.values())
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_stage_3"])
@pytest.mark.parametrize("name", METHODS)
def test_processes_make_equal_numbers_of_calls(name: str, strategy: str, pretrained: str, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    with_package().run([script, name, pretrained, strategy], tmp_path, processes=2)
