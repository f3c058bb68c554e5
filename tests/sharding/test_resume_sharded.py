"""A sharded run resumes with another number of processes, another schedule and other learning rates."""

import json
from pathlib import Path

import pytest
import yaml

from tests.sharding.tiny_runs import SEVERAL_RUNS, STRATEGIES, run_command_line

pytestmark = [pytest.mark.slow, SEVERAL_RUNS]
WITNESS = """
import json
from lightning.pytorch import Callback

class Witness(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        critic = pl_module.auxiliary_optimizers()["alignment.critic"].optimizer
        line = {
            "step": trainer.global_step,
            "index": batch["index"].tolist(),
            "critic": [float(group["lr"]) for group in critic.param_groups],
        }
        with open("witness.jsonl", "a") as file:
            file.write(json.dumps(line) + "\\n")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        with open(f"rates{trainer.global_rank}.txt", "a") as file:
            file.write(f"{float(trainer.optimizers[0].param_groups[0]['lr'])}\\n")
"""


def settings(strategy: str) -> dict:
    return {
        "base": "shapes_meanflow.yaml",
        "model": {
            "init_args": {
                "alignment": {"init_args": {"nfe": [1], "start_step": 0, "critic_warmup_steps": 0, "critic_updates": 1}},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
                "lr_scheduler": None,
                "validation": {"nfe": [1], "teacher_nfe": 2},
            }
        },
        "data": {"init_args": {"size": 22, "batch_size": 2, "prompts_per_category": 1}},
        "trainer": {
            "strategy": strategy,
            "default_root_dir": "run",
            "val_check_interval": 1,
            "limit_val_batches": 0,
            "logger": False,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "AtomicCheckpoint", "init_args": {"dirpath": "run/checkpoints", "every_n_train_steps": 1}},
                {"class_path": "witness.Witness"},
            ],
        },
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_processes_schedules_and_rates_change_at_a_resume(strategy: str, tmp_path: Path) -> None:
    (tmp_path / "witness.py").write_text(WITNESS)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(strategy)))

    def fit(processes: int, steps: int, *options: str) -> str:
        arguments = ["fit", "--config", "run.yaml", f"--trainer.devices={processes}", f"--trainer.max_steps={steps}", *options]
        return run_command_line(tmp_path, *arguments).stdout

    fit(1, 7)
    cosine = ["--model.lr_scheduler=WarmupCosine", "--model.lr_scheduler.total_steps=16"]
    last = "--ckpt_path=last"
    output = fit(2, 8, last, *cosine, "--model.alignment.critic_lr=5e-4")
    assert "lr_scheduler none -> WarmupCosine" in output
    assert "alignment.critic lr 0.001 -> 0.0005" in output
    assert "trainer.devices 2 (checkpoint: 1)" in output
    fit(1, 10, last, "--model.optimizer.lr=2e-3")

    lines = [json.loads(line) for line in (tmp_path / "witness.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 8), 8, 8, 9, 10]
    indices = [index for line in lines for index in line["index"]]
    assert len(indices) == len(set(indices)) == 22  # one epoch: 7 steps of 2 samples, one of 4, and 2 of 2
    assert [line["critic"] for line in lines] == [[1e-3]] * 7 + [[5e-4]] * 2 + [[1e-3]] * 2
    rates = [float(line) for line in (tmp_path / "rates0.txt").read_text().splitlines()]
    half = 1e-3 * 0.5 * (1 + 0.19509032201612833)  # cos(7 pi / 16)
    assert rates == pytest.approx([1e-3] * 7 + [half] + [2e-3] * 2)
