"""The HunyuanImage 3.0 config with sharded networks, on a tiny model: training, export and sampling."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.sharding.tiny_runs import SEVERAL_RUNS, run_command_line
from tests.teachers.hunyuan_image3.tiny_pipeline import save_stand_in

pytestmark = SEVERAL_RUNS


def settings(teacher: str, strategy: str) -> dict:
    return {
        "base": "hunyuan_image3_meanflow.yaml",
        "model": {
            "init_args": {
                "adapter": {"init_args": {"pretrained": teacher, "trust_remote_code": True, "max_sequence_length": 16}},
                "student": {"max_drift": 10.0},
                "ema_decay": 0.9,
                "validation": {"nfe": [1], "teacher_nfe": 1, "height": 32, "width": 32, "solver_steps": 1},
            }
        },
        "data": {"init_args": {"directory": "images", "validation_share": 0.25, "batch_size": 2, "num_workers": 0}},
        "trainer": {
            "accelerator": "cpu",
            "num_nodes": 1,
            "devices": 2,
            "strategy": strategy,
            "max_steps": 3,
            "val_check_interval": 2,
            "default_root_dir": "run",
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "AtomicCheckpoint", "init_args": {"dirpath": "checkpoints", "every_n_train_steps": 1}},
                {"class_path": "SwitchSolution", "init_args": {"latest_step": 2, "guard_factor": None}},
                {"class_path": "ExportPipeline", "init_args": {"directory": "student"}},
            ],
        },
    }


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_stage_3"])
def test_run_switches_exports_and_samples(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, the export from the sharded checkpoint equals that of the training processes, file by file."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    teacher = save_stand_in("newer", tmp_path / "teacher")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(teacher, strategy)))
    (tmp_path / "images").mkdir()
    lines = []
    for i in range(8):
        Image.new("RGB", (32, 32), (20 * i, 100, 255 - 20 * i)).save(tmp_path / "images" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": ["a red circle", "a green square"][i % 2]}))
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(lines))
    run_command_line(tmp_path, "fit", "--config", "run.yaml")

    export = ["--ckpt_path", "checkpoints/last.ckpt", "--directory", "exported"]
    run_command_line(tmp_path, "export", "--config", "run.yaml", *export)
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert names == {path.name for path in (tmp_path / "exported").iterdir()}
    differing = [
        name for name in names if (tmp_path / "student" / name).read_bytes() != (tmp_path / "exported" / name).read_bytes()
    ]
    assert sorted(differing) == ["README.md", "SHA256SUMS"]  # the card has the training time

    options = ["--nfe", "2", "--height", "32", "--width", "32", "--out", "sample.png", "--trust_remote_code"]
    run_command_line(tmp_path, "sample", "--pipeline", "exported", "--prompt", "a red circle", *options)
    assert Image.open(tmp_path / "sample.png").size == (32, 32)
