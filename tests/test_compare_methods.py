"""Comparison of methods: settings of the runs, and the merged results. The runs themselves take hours."""

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_distill.commands.config_files import shipped_configs
from lightning_distill.data.shapes import CATEGORIES

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compare_methods.py"
OTHER_CONFIGS = (
    *("student", "two_cores", "teacher", "vae", "timestep_rescaling"),
    *("meanflow_full", "dmd2_second_stage", "dmd2_one_step"),
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_methods", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(one_step: float, reached: float) -> dict[str, Any]:
    accuracy = {"1": one_step, "2": 0.7, "4": 0.8, "8": 0.9}
    return {
        "summary": {
            "teacher": {**accuracy, "32": 0.9},
            "student": accuracy,
            "diversity": {"student": dict.fromkeys(accuracy, 0.3), "teacher": {"32": 0.4}},
            "categories": {"student": {n: dict.fromkeys(CATEGORIES, value) for n, value in accuracy.items()}},
        },
        "date": "2026-01-01",
        "machine": "one",
        "steps": 100,
        "frechet": dict.fromkeys(accuracy, 2.0),
        "curve": {n: [(0.1, 0.1), (reached, 0.85)] for n in accuracy},
    }


def test_comparison_includes_every_method_with_a_config(script) -> None:
    shapes = {name for name in shipped_configs() if name.startswith("shapes_")}
    assert set(script.METHODS.values()) == shapes - {f"shapes_{name}.yaml" for name in OTHER_CONFIGS}


def test_numbers_of_steps_are_scaled_together(script, demo, tmp_path) -> None:
    half = script.run_config(script.scale_steps(demo, 0.5), 3, tmp_path, keep=lambda name: name == "SwitchSolution")
    model = half["model"]["init_args"]
    assert half["trainer"]["max_steps"] == 750
    assert model["lr_scheduler"]["init_args"] == {"total_steps": 750, "warmup_steps": 10, "last_fraction": 0.0, "hold_steps": 0}
    assert model["alignment"]["init_args"]["start_step"] == 300
    assert model["alignment"]["init_args"]["critic_updates"] == 2
    (switch,) = half["trainer"]["callbacks"]
    assert switch["init_args"]["earliest_step"] == 625
    assert half["seed_everything"] == half["data"]["init_args"]["seed"] == 3
    assert demo["trainer"]["max_steps"] == 1500
    alone = script.single_process(half)
    assert (alone["trainer"]["devices"], alone["trainer"]["strategy"], alone["data"]["init_args"]["batch_size"]) == (
        1,
        "auto",
        32,
    )
    assert half["data"]["init_args"]["batch_size"] == 16


def test_seeds_are_merged_and_tabulated(script) -> None:
    merged = script.merge([record(0.4, 0.25), record(0.6, 0.5)], teacher=0.9, cost=0.5, minutes=8)
    assert merged["1"]["mean"] == pytest.approx(0.5)
    assert merged["1"]["std"] == pytest.approx(0.1414, abs=1e-4)
    assert merged["1"]["minutes_to_teacher"] == pytest.approx(3.0)
    assert merged["1"]["seconds_per_step"] == 0.5
    never = script.merge([record(0.4, 0.25), {**record(0.6, 1.0), "curve": {n: [(1.0, 0.2)] for n in "1248"}}], 0.9, 0.5, 8)
    assert never["1"]["minutes_to_teacher"] is None
    text = script.table({"run": {"teacher": {"32": 0.9}}, "imm": merged})
    assert "| imm | 1 | 50.0 |" in text
    assert "| 50.0 ± 14.1 | 0.300 | 2.00 | 0.500 | 3.0 |" in text


def test_results_use_recorded_runs_and_recorded_costs(script, tmp_path, monkeypatch) -> None:
    records = tmp_path / "compare_methods"
    for name, value in (("RESULTS", tmp_path), ("RECORDS", records), ("COSTS", records / "costs.json")):
        monkeypatch.setattr(script, name, value)
    records.mkdir()
    seconds = {"imm": 0.5, "tdm": 0.25}
    (records / "costs.json").write_text(json.dumps({"date": "2026-01-01", "machine": "one", "seconds_per_step": seconds}))
    (records / "imm-0.json").write_text(json.dumps(record(0.4, 0.25)))
    (records / "tdm-0.json").write_text(json.dumps({**record(0.6, 0.5), "date": "2026-01-02", "machine": "another"}))
    script.write(8.0)
    result = json.loads((tmp_path / "compare_methods.json").read_text())
    assert (result["run"]["date"], result["run"]["machine"], result["run"]["run_on"]) == (
        "2026-01-02",
        "one",
        ["another", "one"],
    )
    assert (result["tdm"]["1"]["mean"], result["tdm"]["1"]["seconds_per_step"]) == (0.6, 0.25)
    assert result["tdm"]["1"]["minutes_to_teacher"] == 4.0
    assert (tmp_path / "compare_methods.png").is_file()
    assert (tmp_path / "compare_methods_minutes.png").is_file()
    pool = ThreadPoolExecutor(1)
    assert script.costs({"imm": {}}, "another", tmp_path, pool) == seconds
    with pytest.raises(SystemExit, match="no cost of ladd"):
        script.costs({"imm": {}, "ladd": {}}, "another", tmp_path, pool)
    assert script.measure("imm", {}, 0, 100, "another", tmp_path)["machine"] == "one"
    with pytest.raises(SystemExit, match="has 100 steps, and --minutes gives 200"):
        script.measure("imm", {}, 0, 200, "another", tmp_path)
