"""Every subcommand refuses a damaged pipeline in one line, before it loads a model."""

from pathlib import Path

import pytest

from lightning_distill.commands.main import main
from tests.tiny import save_tiny_pipeline


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(save_tiny_pipeline(tmp_path / "model"))


def arguments(command: str) -> list[str]:
    if command == "sample":
        return ["sample", "--pipeline", "model", "--prompt", "a circle", "--out", "x.png"]
    more = {"export": ["--ckpt_path", "none.ckpt"], "precompute": ["--out", "latents"]}.get(command, [])
    trainer = [
        "--trainer.devices",
        "1",
        "--trainer.strategy",
        "auto",
        "--trainer.default_root_dir",
        "run",
        "--trainer.logger",
        "false",
        "--trainer.callbacks",
        "[]",
    ]
    return [command, "--config", "shapes_meanflow.yaml", "--model.adapter.pretrained", "model", *trainer, *more]


def error_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments(command))
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "is 'model'" in line
    return line


@pytest.mark.parametrize("command", ["fit", "validate", "predict", "export", "precompute", "sample"])
def test_truncated_weights_are_one_line(command: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert "transformer has an incomplete or damaged diffusion_pytorch_model.safetensors" in error_of(command, capsys)


@pytest.mark.parametrize("command", ["fit", "test", "plan", "sample"])
def test_a_damaged_index_is_one_line(command: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "model_index.json").write_text("[]")
    assert "whose model_index.json is not the index of a pipeline" in error_of(command, capsys)


def test_plan_needs_no_weights(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in model.rglob("*.safetensors"):
        file.unlink()
    main(arguments("plan"))
    assert "student" in capsys.readouterr().out
