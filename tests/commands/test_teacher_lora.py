"""`adapter.lora` on the command line: its forms, training, export, precomputed data, plans, and error messages."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from lightning_distill.commands.main import main
from lightning_distill.commands.training import DistillCLI
from lightning_distill.teachers import LoraOptions, StudentOptions, TeacherLora
from tests.command_errors import error_line
from tests.teachers.lora_files import random_factors, save_lora
from tests.tiny import load_adapter, save_tiny_pipeline

UNTRAINED = "x_embedder.weight"
"""A weight that the LoRA files update, and LoRA students do not train."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with a teacher, two LoRA files for it, and the config of a short run of a LoRA student."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    teacher = save_tiny_pipeline(folder / "teacher")
    for seed in (0, 1):
        save_lora(random_factors(teacher, seed, "x_embedder"), folder / f"style_{seed}.safetensors")
    config = {
        "base": "shapes_student.yaml",
        "model": {
            "class_path": "MeanFlow",
            "init_args": {
                "adapter": {"init_args": {"pretrained": "teacher"}},
                "student": {"max_drift": 10.0, "lora": {"rank": 2}},
                "ema_decay": None,
                "lr_scheduler": None,
                "metric": None,
                "validation": {"nfe": [1], "average_velocity": False},
            },
        },
        "data": {"init_args": {"size": 8, "batch_size": 4, "prompts_per_category": 1}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 1,
            "limit_val_batches": 0,
            "logger": False,
            "enable_progress_bar": False,
            "default_root_dir": "run",
            "callbacks": [
                {
                    "class_path": "AtomicCheckpoint",
                    "init_args": {"dirpath": "${trainer.default_root_dir}", "every_n_train_steps": 1},
                }
            ],
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("STYLES", str(folder))


def lora(value: Any) -> str:
    return f"--model.adapter.lora={json.dumps(value) if not isinstance(value, str) else value}"


def merged(*loras: TeacherLora) -> dict[str, Tensor]:
    state: dict[str, Tensor] = load_adapter("teacher", lora=loras).load_teacher().state_dict()
    return state


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("style_0.safetensors", [("style_0.safetensors", 1.0)]),
        (["style_0.safetensors", "style_1.safetensors"], [("style_0.safetensors", 1.0), ("style_1.safetensors", 1.0)]),
        ({"path": "style_0.safetensors", "weight": 2}, [("style_0.safetensors", 2.0)]),
        (
            [{"path": "${oc.env:STYLES}/style_0.safetensors", "weight": 0.5}, "style_1.safetensors"],
            [("{folder}/style_0.safetensors", 0.5), ("style_1.safetensors", 1.0)],
        ),
    ],
)
def test_files_with_and_without_weights(value: Any, expected: list[tuple[str, float]], folder: Path) -> None:
    cli = DistillCLI(["--config=run.yaml", lora(value)], run=False)
    assert cli.model.adapter.lora == tuple(TeacherLora(path.format(folder=folder), weight) for path, weight in expected)


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    missing = error_line(capsys, "fit", "--config=run.yaml", lora("missing.safetensors"))
    assert "model.adapter.lora is 'missing.safetensors', which is neither a file" in missing
    misspelt = error_line(capsys, "fit", "--config=run.yaml", lora([{"path": "style_0.safetensors", "wieght": 1}]))
    assert "did you mean weight?" in misspelt
    infinite = error_line(
        capsys,
        "fit",
        "--config=run.yaml",
        lora([{"path": "style_0.safetensors", "weight": float("inf")}]).replace("Inf", ".inf"),
    )
    assert "weight" in infinite
    none = error_line(capsys, "fit", "--config=run.yaml", "--model.student.interval_embedding=none")
    assert "interval_embedding is none, but" in none


def test_run_resumes_and_exports_on_the_merged_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    loras = lora([{"path": "style_0.safetensors", "weight": 0.5}, {"path": "style_1.safetensors", "weight": -1}])
    main(["fit", "--config=run.yaml", loras])
    main(["fit", "--config=run.yaml", loras, "--ckpt_path=last", "--trainer.max_steps=2"])
    main(["export", "--config=run.yaml", loras, "--ckpt_path=last", "--directory=student", "--format=[any_step]"])
    (file,) = Path("student/transformer").glob("*.safetensors")
    student = load_file(file)
    teacher = merged(TeacherLora("style_0.safetensors", 0.5), TeacherLora("style_1.safetensors", -1.0))
    plain = merged()
    assert torch.equal(student[UNTRAINED], teacher[UNTRAINED])
    assert not torch.allclose(student[UNTRAINED], plain[UNTRAINED])
    card = Path("student/README.md").read_text()
    assert "| LoRA merged into it | style_0.safetensors (weight 0.5), style_1.safetensors (weight -1) |" in card
    other = error_line(
        capsys, "export", "--config=run.yaml", lora("style_0.safetensors"), "--ckpt_path=last", "--directory=other"
    )
    assert "model.adapter.lora is style_0.safetensors, and ckpt_path" in other


def test_precomputed_data_serves_any_lora() -> None:
    main(["precompute", "--config=run.yaml", lora("style_0.safetensors"), "--out=encoded"])
    precomputed = ["--data=Precomputed", "--data.directory=encoded", "--data.batch_size=2", "--data.num_workers=0"]
    data = yaml.safe_load(Path("run.yaml").read_text())
    del data["data"]
    Path("precomputed.yaml").write_text(yaml.safe_dump(data))
    main(["fit", "--config=precomputed.yaml", lora("style_1.safetensors"), *precomputed, "--trainer.default_root_dir=second"])


def test_plan_of_a_student_without_an_interval_input() -> None:
    """Its LoRA alone trains."""
    time = ["--model.student.interval_embedding=none", "--model.student.time_embedding=original"]
    main(["plan", "--config=run.yaml", "--model=ConsistencyDistillation", "--gpus=1", "--json=plan.json", *time])
    _, trained = json.loads(Path("plan.json").read_text())["parameters"]["student"]
    adapter = load_adapter("teacher")
    options = StudentOptions(interval_embedding="none", time_embedding="original", lora=LoraOptions(rank=2))
    student, _ = adapter.build_student(adapter.load_teacher(), options)
    assert trained == sum(value.numel() for name, value in student.named_parameters() if "lora_" in name)


def test_plan_does_not_read_the_files() -> None:
    main(["plan", "--config=run.yaml", "--gpus=1", "--json=plan.json", lora("on_another_machine.safetensors")])
    assert json.loads(Path("plan.json").read_text())["fits"]
