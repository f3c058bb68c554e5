"""The example of a new method in CONTRIBUTING.md works as it stands there."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from lightning_distill.commands.main import main
from tests.tiny import tiny_pipeline

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)
    return found


def test_example_is_short() -> None:
    code = block("python")
    assert len(code[code.index("class ") :].splitlines()) <= 30


def test_example_trains_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("endpoint.py").write_text(block("python"))
    settings = yaml.safe_load(block("yaml"))
    tiny_pipeline().save_pretrained("teacher")
    settings["model"]["init_args"] = {"adapter": {"init_args": {"pretrained": "teacher"}}, "metric": None}
    settings["model"]["init_args"]["student"] = {"max_drift": 10.0}  # a random teacher's velocities mean nothing
    settings["trainer"] |= {"max_steps": 2, "val_check_interval": 1, "limit_val_batches": 1, "default_root_dir": "run"}
    settings["trainer"]["accelerator"] = "cpu"
    settings["data"] = {"init_args": {"size": 16, "batch_size": 4, "prompts_per_category": 1}}
    Path("endpoint.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", "--config", "endpoint.yaml"])
    assert list(Path("run").rglob("*.ckpt"))
    sys.modules.pop("endpoint")
