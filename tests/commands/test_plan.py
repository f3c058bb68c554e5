"""The `plan` command: shipped configs, all teacher families, error messages, and accuracy of the estimates."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lightning_distill.commands.main import main
from lightning_distill.teachers import DiffusersAdapter
from tests.teachers.tiny_families import FAMILIES, save_family
from tests.tiny import save_tiny_pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["plan", *arguments])
    errors = capsys.readouterr().err
    assert end.value.code == 2, errors
    return errors[errors.index("error: ") :]


def test_config_for_eight_gpus_is_planned_without_gpus_or_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_pipeline(tmp_path / "teacher", guidance_embeds=True)
    for file in tmp_path.glob("teacher/**/*.safetensors"):
        file.unlink()
    main(
        [
            *("plan", "--config", "flux_meanflow.yaml", "--model_config=teacher", "--json=plan.json", "--gpus=8"),
            *("--model.validation.height=32", "--model.validation.width=32"),
        ]
    )
    printed = capsys.readouterr().out
    numbers = json.loads((tmp_path / "plan.json").read_text())
    assert numbers["strategy"] == "fsdp2"
    assert numbers["processes"] == 8
    assert numbers["communication"].keys() == {"discrete", "differential"}
    assert numbers["peak"] == pytest.approx(sum(numbers["gpu"].values()))
    assert numbers["fits"]
    assert numbers["smallest"] == 1
    assert "fsdp2 fits on 8 x 80 GB" in printed.replace("\n", " ")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_planned_from_its_config_files(family: str, tmp_path: Path) -> None:
    directory = Path(save_family(family, tmp_path / "teacher"))
    counts = {}
    for path in directory.glob("*/*.safetensors"):
        counts[path.parent.name] = sum(tensor.numel() for tensor in load_file(path).values())
        path.unlink()
    guided = DiffusersAdapter(str(directory))
    guided.check(weights=False)
    guidance = [] if guided.embeds_guidance else ["--model.guidance.kind=two_branch", "--model.guidance.scales=null"]
    main(
        [
            *("plan", "--config", "flux_meanflow.yaml", "--model_config=teacher", "--json=plan.json", "--gpus=2", *guidance),
            *("--model.validation.height=32", "--model.validation.width=32", "--model.solver=euler", "--model.solver_steps=1"),
        ]
    )
    numbers = json.loads((tmp_path / "plan.json").read_text())
    assert 0.97 < numbers["parameters"]["teacher"][0] / counts["transformer"] <= 1  # files also contain buffers
    assert 0.9 < numbers["parameters"]["student"][1] / numbers["parameters"]["student"][0] <= 1
    assert numbers["communication"].keys() == {"discrete", "differential"}


def test_unsupported_settings_raise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unknown = error_line(capsys, "--config", "flux_meanflow.yaml", "--model.adapter.pretrained=some/model")
    assert "adapter.pretrained is 'some/model', whose configuration is not on this machine" in unknown
    assert "gpus is 0" in error_line(capsys, "--config", "flux_meanflow.yaml", "--gpus=0")
    assert "model_config is 'nowhere'" in error_line(capsys, "--config", "flux_meanflow.yaml", "--model_config=nowhere")
    lora = error_line(capsys, "--config", "flux_meanflow_lora.yaml", "--trainer.strategy=deepspeed_stage_3")
    assert "ZeRO-3 does not support LoRA; set trainer.strategy to fsdp2, auto or ddp" in lora
    assert "model is Autoencoder, which has no teacher" in error_line(capsys, "--config", "shapes_vae.yaml")
    discriminator = error_line(capsys, "--config", "shapes_dmd2.yaml")
    assert "model is DMD2 with a discriminator, which plan does not support" in discriminator


@pytest.mark.slow
@pytest.mark.parametrize("name", ["differential, checkpointed", "LoRA, differential"])
def test_planned_peaks_match_measured_peaks(name: str) -> None:
    script = ROOT / "benchmarks" / "plan_check.py"
    spec = importlib.util.spec_from_file_location("plan_check", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan_check"] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    row = module.check(module.CASES[name])
    assert row["measured_mib"] > 50
    assert abs(row["ratio"] - 1) < module.BOUND
