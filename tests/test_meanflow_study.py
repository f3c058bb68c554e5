"""MeanFlow study: settings of the runs, and the merged results. The runs themselves take hours."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from lightning_distill.commands.main import main

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "meanflow_study.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("meanflow_study", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(settings: dict[str, Any], path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(path), "--print_config"])
    output = capsys.readouterr()
    assert end.value.code == 0, output.err
    return yaml.safe_load(output.out)


@pytest.mark.parametrize(
    ("variant", "time_embedding", "latest_step", "aligned"),
    [
        ("differential_original_time", "original", 0, False),
        ("differential", "smooth", 0, False),
        ("discrete", "smooth", 10**9, False),
        ("switched", "smooth", None, False),
        ("switched_aligned", "smooth", None, True),
    ],
)
def test_variant_settings(study, demo, tmp_path, capsys, variant, time_embedding, latest_step, aligned) -> None:
    settings = parsed(study.variant_config(demo, variant, 2, tmp_path), tmp_path / "config.yaml", capsys)
    model = settings["model"]["init_args"]
    (switch,) = [c["init_args"] for c in settings["trainer"]["callbacks"] if c["class_path"].endswith("SwitchSolution")]
    (demo_switch,) = [c["init_args"] for c in demo["trainer"]["callbacks"] if c["class_path"].endswith("SwitchSolution")]
    assert settings["seed_everything"] == settings["data"]["init_args"]["seed"] == 2
    share = study.VARIANTS[variant]["steps"]
    assert (share == 1) == aligned  # the demo is aligned; steps without alignment take less time
    assert settings["trainer"]["max_steps"] == round(share * demo["trainer"]["max_steps"])
    assert model["lr_scheduler"]["init_args"]["total_steps"] == settings["trainer"]["max_steps"]
    assert model["student"]["time_embedding"] == time_embedding
    demo_rates = {
        "lr": demo["model"]["init_args"]["optimizer"]["init_args"]["lr"],
        "p": demo["model"]["init_args"]["loss"]["init_args"]["p"],
    }
    expected = study.FROM_THE_START if variant.startswith("differential") else demo_rates
    assert {"lr": model["optimizer"]["init_args"]["lr"], "p": model["loss"]["init_args"]["p"]} == expected
    assert model["alignment"] == (demo["model"]["init_args"]["alignment"] if aligned else None)
    if latest_step is None:
        assert switch == demo_switch | {key: round(share * demo_switch[key]) for key in ("earliest_step", "latest_step")}
    else:
        assert (switch["latest_step"], switch["threshold"], switch["guard_factor"]) == (latest_step, None, None)


def test_every_variant_is_tested(study: ModuleType) -> None:
    assert list(study.VARIANTS) == ["differential_original_time", "differential", "discrete", "switched", "switched_aligned"]


def test_results_are_merged_from_recorded_runs(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "RECORDS", tmp_path / "meanflow_study")
    (tmp_path / "meanflow_study").mkdir()
    teacher = {"1": 0.0, "2": 0.1, "4": 0.7, "8": 0.8, "32": 0.9}
    reached = {"discrete-0": 0.25, "discrete-1": 0.75, "switched-0": 0.5, "full": 0.875, "second_stage": 1.0, "one_step": 0.75}
    for name, accuracy in reached.items():
        figures = dict.fromkeys(study.STEPS, accuracy)
        summary = {"teacher": teacher, "student": figures, "minutes": 3.0}
        summary["diversity"] = {"student": dict.fromkeys(study.STEPS, 0.3), "teacher": {"32": 0.4}}
        record = {"summary": summary, "curves": {tag: [[9, 0.5], [19, accuracy]] for tag in study.CURVES}}
        (tmp_path / "meanflow_study" / f"{name}.json").write_text(json.dumps(record))
        assert study.run({}, name, tmp_path) == summary  # recorded, so not repeated
    study.write("a machine")
    result = json.loads((tmp_path / "meanflow_study.json").read_text())
    assert (result["machine"], result["seeds"], result["teacher"]) == ("a machine", [0, 1], teacher)
    assert set(result["variants"]) == {"discrete", "switched"}
    assert result["variants"]["discrete"]["accuracy"] == dict.fromkeys(study.STEPS, 0.5)
    assert result["variants"]["discrete"]["std"]["1"] == pytest.approx(0.5 / 2**0.5)
    assert result["full"]["accuracy"]["1"] == 0.875
    assert result["second_stage"]["accuracy"]["1"] == 1.0
    assert "| its second stage, by DMD2 | 100.0 |" in (tmp_path / "meanflow_study.md").read_text()
    assert "| a third, for one step | 75.0 |" in (tmp_path / "meanflow_study.md").read_text()
    assert "| discrete | 50.0 ± 35.4 |" in (tmp_path / "meanflow_study.md").read_text()
    assert (tmp_path / "meanflow_study.png").is_file()
    assert (tmp_path / "meanflow_study_curves.png").is_file()
