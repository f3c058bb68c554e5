"""The FLUX.1-dev configs with sharded networks, on the shipped teacher: training, resuming, export and sampling."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tests.sharding.tiny_runs import SEVERAL_RUNS, run_command_line

pytestmark = SEVERAL_RUNS
KILLER = """
import os, signal
from lightning.pytorch import Callback

class KillAt(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with open(f"losses{trainer.global_rank}.txt", "a") as file:
            file.write(f"{trainer.global_step} {pl_module.solution} {float(outputs['loss'])!r}\\n")
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def settings(strategy: str, base: str) -> dict:
    lora = "unmerged" if "lora" in base else "merged"
    formats = ["any_step", "lora"] if "lora" in base else None
    return {
        "base": base,
        "model": {
            "init_args": {
                "adapter": {"init_args": {"pretrained": "shapes-teacher", "torch_dtype": "float32"}},
                "guidance": {"kind": "two_branch", "scales": None},
                "solver": "euler",
                "alignment": {
                    "class_path": "TrajectoryAlignment",
                    "init_args": {"nfe": [1, 2], "start_step": 0, "critic_warmup_steps": 0},
                },
                "ema_decay": 0.9,
                "validation": {"nfe": [1, 2], "teacher_nfe": 2, "height": 32, "width": 32, "samples": 2, "solver_steps": 1},
            }
        },
        "data": {"init_args": {"directory": "images", "validation_share": 0.2, "batch_size": 2, "num_workers": 0}},
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "strategy": strategy,
            "default_root_dir": "run",
            "accumulate_grad_batches": 1,
            "max_steps": 4,
            "val_check_interval": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "AtomicCheckpoint", "init_args": {"dirpath": "run/checkpoints", "every_n_train_steps": 1}},
                {"class_path": "SwitchSolution", "init_args": {"latest_step": 2}},
                {"class_path": "LogImages", "init_args": {"columns": 1}},
                {"class_path": "FinalReport", "init_args": {"columns": 1, "diversity_prompts": 0}},
                {"class_path": "ExportPipeline", "init_args": {"directory": "student", "formats": formats, "lora": lora}},
                {"class_path": "killer.KillAt", "init_args": {"step": 3}},
            ],
        },
    }


def losses(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "losses0.txt").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("strategy", "base"),
    [
        pytest.param("deepspeed_stage_3", "flux_meanflow.yaml", marks=pytest.mark.slow),
        pytest.param("fsdp2", "flux_meanflow.yaml", marks=pytest.mark.slow),
        pytest.param("fsdp2", "flux_meanflow_lora.yaml", marks=pytest.mark.slow),
    ],
)
def test_run_switches_resumes_after_a_kill_exports_and_samples(strategy: str, base: str, tmp_path: Path) -> None:
    (tmp_path / "killer.py").write_text(KILLER)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(strategy, base)))
    (tmp_path / "images").mkdir()
    captions = ["a red circle", "a green square", "two blue triangles", "a small yellow circle"]
    lines = []
    for i in range(10):
        Image.new("RGB", (32, 32), (20 * i, 100, 255 - 20 * i)).save(tmp_path / "images" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": captions[i % 4]}))
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(lines))

    assert run_command_line(tmp_path, "fit", "--config", "run.yaml", check=False).returncode != 0
    killed = losses(tmp_path)
    assert [(step, solution) for step, solution, _ in killed] == [
        ("1", "discrete"),
        ("2", "discrete"),
        ("3", "differential"),
    ]
    assert not (tmp_path / "student").exists()
    second = (tmp_path / "losses1.txt").read_text().splitlines()
    assert [line.split()[2] for line in second] != [loss for _, _, loss in killed]  # processes have different data and noise

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(strategy, base)).replace("step: 3", "step: -1"))
    run_command_line(tmp_path, "fit", "--config", "run.yaml", "--ckpt_path", "last")
    resumed = losses(tmp_path)[3:]
    assert resumed[0] == killed[2]  # the lost step has exactly the same loss
    assert [step for step, _, _ in resumed] == ["3", "4"]
    rest = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt" / "rest.pt", weights_only=True)
    assert rest["global_step"] == 4
    assert (tmp_path / "run" / "images.png").is_file()

    export = ["--ckpt_path", "run/checkpoints/last.ckpt", "--directory", "exported"]
    lora = ["--lora", "unmerged", "--format", "any_step", "lora"] if "lora" in base else []
    run_command_line(tmp_path, "export", "--config", "run.yaml", *export, *lora)
    first, second = files(tmp_path / "student"), files(tmp_path / "exported")
    assert first.keys() == second.keys()
    assert {Path(name).parts[0] for name in first if "/" in name} == (
        {"any_step", "lora_1", "lora_2"} if lora else {"any_step", "stock_2"}
    )
    differing = {Path(name).name for name in first if first[name] != second[name]}
    # The model card has the training time, and peft lists layers in the order of a set.
    assert differing - {"adapter_config.json"} == {"README.md", "SHA256SUMS"}

    size = ["--height", "32", "--width", "32"]
    prompt = ["--prompt", "a red circle", "--nfe", "2", *size, "--out", "sample.png"]
    run_command_line(tmp_path, "sample", "--pipeline", "student", *prompt)
    assert Image.open(tmp_path / "sample.png").size == (32, 32)
