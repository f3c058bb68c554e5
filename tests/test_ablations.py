"""Ablations benchmark: settings of the runs, and the merged results. The runs themselves take hours."""

import json
from pathlib import Path
from typing import Any

import ablations
import pytest
import yaml

from lightning_distill.commands.main import main

VARIANTS = [(group, name) for group, variants in ablations.GROUPS.items() for name in variants]


def flat(settings: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {path: settings}
    found = [flat(value, f"{path}.{name}".lstrip(".")) for name, value in settings.items()]
    return {name: value for each in found for name, value in each.items()}


@pytest.mark.parametrize(("group", "name"), VARIANTS)
def test_variant_differs_from_the_recipe_in_its_setting_only(group, name, demo, tmp_path, capsys) -> None:
    changes = ablations.GROUPS[group][name]
    recipe = ablations.variant_config(demo, {}, 600, 1, tmp_path)
    settings = ablations.variant_config(demo, changes, 600, 1, tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(tmp_path / "config.yaml"), "--print_config"])
    output = capsys.readouterr()
    assert end.value.code == 0, output.err
    one, other = flat(recipe["model"]), flat(settings["model"])
    changed = {path.removeprefix("init_args.") for path in one.keys() | other.keys() if one.get(path) != other.get(path)}
    expected = [path for path in changes if path != "switch"]
    assert all(any(path.startswith(allowed) for allowed in expected) for path in changed)
    assert bool(changed) == bool(expected) or name == "smooth, up to 2 pi"
    assert other["init_args.alignment"] is None
    assert settings["trainer"]["max_steps"] == 600
    switches = [each["init_args"] for each in settings["trainer"]["callbacks"] if each["class_path"].endswith("SwitchSolution")]
    at = round(600 * changes.get("switch", ablations.SWITCH_AT))
    (report,) = [each["init_args"] for each in settings["trainer"]["callbacks"] if each["class_path"].endswith("FinalReport")]
    assert report["teacher"] == (name == "as it is")
    assert [switch["latest_step"] for switch in switches] == ([at] if at < 600 else [])


def test_unknown_setting_raises(demo, tmp_path) -> None:
    with pytest.raises(KeyError, match=r"no setting 'loss\.q'"):
        ablations.variant_config(demo, {"loss.q": 1}, 600, 1, tmp_path)


def test_results_are_merged_from_recorded_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablations, "RESULTS", tmp_path)
    monkeypatch.setattr(ablations, "RECORDS", tmp_path / "ablations")
    (tmp_path / "ablations").mkdir()
    for seed, accuracy in enumerate((0.25, 0.75)):
        record = {
            "steps": 9,
            "accuracy": dict.fromkeys(ablations.STEPS, accuracy),
            "diversity": {"1": 0.3},
            "teacher": {"32": 0.9} if seed else {},
            "minutes": 2.0,
            "error": 0.2,
            "gradient_norm": {"median": 1.0, "largest": 5.0},
        }
        (tmp_path / "ablations" / f"gamma_1-{seed}.json").write_text(json.dumps(record))
    records = [ablations.measure({}, "gamma 1", {}, 9, seed, tmp_path) for seed in (0, 1)]
    with pytest.raises(SystemExit, match="has 9 steps, and --steps is 10"):
        ablations.measure({}, "gamma 1", {}, 10, 0, tmp_path)
    ablations.write({"recipe": {"as it is": []}, "loss": {"gamma 1": records}}, "a machine", 9)
    result = json.loads((tmp_path / "ablations.json").read_text())
    assert list(result["groups"]) == ["loss"]
    assert result["groups"]["loss"]["gamma 1"]["accuracy"]["1"] == pytest.approx(0.5)
    assert result["groups"]["loss"]["gamma 1"]["std"]["1"] == pytest.approx(0.5 / 2**0.5)
    text = (tmp_path / "ablations.md").read_text()
    assert "| loss | gamma 1 | 50.0 ± 35.4 | 50.0 ± 35.4 | 50.0 ± 35.4 | 50.0 ± 35.4 | 0.300 | 0.200 | 1.00 | 5.0 |" in text
    assert "Teacher: 90.0 at 32." in text
