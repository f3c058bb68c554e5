"""The config for HunyuanImage 3.0, on a stand-in, whose networks two processes share: from the start to pictures."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.sharding.test_command_line import command
from tests.teachers.hunyuan_image3.tiny_pipeline import save_stand_in


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
        "data": {"init_args": {"directory": "pictures", "validation_share": 0.25, "batch_size": 2, "num_workers": 0}},
        "trainer": {
            "accelerator": "cpu",
            "num_nodes": 1,
            "devices": 2,
            "strategy": strategy,
            "max_steps": 3,
            "val_check_interval": 2,
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
def test_its_config_trains_switches_exports_and_draws(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16; from a sharded checkpoint comes, file by file, what the processes themselves export."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    teacher = save_stand_in("newer", tmp_path / "teacher")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(teacher, strategy)))
    (tmp_path / "pictures").mkdir()
    lines = []
    for i in range(8):
        Image.new("RGB", (32, 32), (20 * i, 100, 255 - 20 * i)).save(tmp_path / "pictures" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": ["a red circle", "a green square"][i % 2]}))
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    trained = command(tmp_path, "fit", "--config", "run.yaml")
    assert trained.returncode == 0, trained.stderr[-3000:]

    place = ["--ckpt_path", "checkpoints/last.ckpt", "--directory", "exported"]
    exported = command(tmp_path, "export", "--config", "run.yaml", *place)
    assert exported.returncode == 0, exported.stderr[-3000:]
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert names == {path.name for path in (tmp_path / "exported").iterdir()}
    differing = [
        name for name in names if (tmp_path / "student" / name).read_bytes() != (tmp_path / "exported" / name).read_bytes()
    ]
    assert differing == ["README.md"]  # which tells of the training's time

    picture = ["--nfe", "2", "--height", "32", "--width", "32", "--out", "drawn.png", "--trust_remote_code"]
    drawn = command(tmp_path, "sample", "--pipeline", "exported", "--prompt", "a red circle", *picture)
    assert drawn.returncode == 0, drawn.stderr[-3000:]
    assert Image.open(tmp_path / "drawn.png").size == (32, 32)
