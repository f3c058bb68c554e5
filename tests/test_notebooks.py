"""Notebooks run from top to bottom, do what their text says, and lie in git without what they have printed."""

import json
import re
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import pytest
import yaml

from lightning_distill.commands.config_files import config_directory
from lightning_distill.commands.main import main
from lightning_distill.errors import ConfigurationError
from lightning_distill.methods import Guidance
from lightning_distill.teachers import DiffusersAdapter

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
STUDENT, TEACHER = {"1", "2", "4", "8"}, {"1", "2", "4", "8", "32"}
"""Numbers of steps at which runs on the embedded teacher measure each."""


def cells(name: str, kind: str = "code") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((NOTEBOOKS / name).read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def text(name: str, kind: str) -> str:
    """What a notebook says, of kind "markdown", or does, of kind "code"."""
    return "\n".join("".join(cell["source"]) for cell in cells(name, kind))


def run(name: str, **settings: int) -> dict[str, Any]:
    """Names and values at the end of a notebook, whose cells are plain Python.

    Args:
        name: File of the notebook.
        **settings: Other values of numbers that it sets in a line of their own.
    """
    sources = ["".join(cell["source"]) for cell in cells(name)]
    for setting, value in settings.items():
        replaced = [re.subn(rf"^{setting} = \d+", f"{setting} = {value}", source, flags=re.MULTILINE) for source in sources]
        assert sum(count for _, count in replaced) == 1, setting
        sources = [source for source, _ in replaced]
    values: dict[str, Any] = {"__name__": "__main__"}
    for source in sources:
        exec(compile(source, name, "exec"), values)
    plt.close("all")
    return values


def falls(curve: tuple[list[int], list[float]], since: int = 0) -> bool:
    """Whether the last third of a curve lies below its first, from a step on."""
    values = [value for step, value in zip(*curve, strict=True) if step >= since]
    third = len(values) // 3
    assert third, "too few values to tell"
    return mean(values[-third:]) < mean(values[:third])


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory from which modules are imported, as a notebook's is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")))
def test_outputs_are_stripped(name: str) -> None:
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells(name))


@pytest.mark.slow
def test_two_dimensions() -> None:
    """What its text says of its pictures: the identity holds, and students that know it land near the data in one step."""
    values = run("meanflow_in_two_dimensions.ipynb")
    assert values["error"] < 1e-3
    assert values["without"] > 0.5
    one_step = {target: found[1] for target, found in values["distances"].items()}
    assert one_step["flow matching"] > 0.8
    assert max(one_step["discrete"], one_step["differential"]) < 0.4


@pytest.mark.slow
def test_distil_and_compare(elsewhere: Path) -> None:
    """It trains, measures both at the same steps, leaves other runs alone, and one noise gives both the same scene."""
    values = run("distil_and_compare.ipynb", STEPS=30, PROMPTS_PER_CATEGORY=1)
    directory = elsewhere / values["RUN"]
    assert [path.name for path in elsewhere.iterdir()] == ["runs"]
    assert [path.name for path in (elsewhere / "runs").iterdir()] == [directory.name]
    assert {"logs", "images.png", "student", "summary.json"} <= {path.name for path in directory.iterdir()}

    summary = values["summary"]
    assert summary["student"].keys() == STUDENT
    assert summary["teacher"].keys() == TEACHER
    assert summary["teacher"]["32"] > max(0.7, summary["teacher"]["1"])
    assert falls(values["curve"]("train/loss"), since=20)
    assert falls(values["curve"]("val/average_velocity_error"))

    drawn = {name: pictures for name, (pictures, _) in values["rows"].items()}
    assert {tuple(pictures.shape) for pictures in drawn.values()} == {(len(values["PROMPTS"]), 3, 32, 32)}
    students, teachers = drawn["student, 4"], drawn["teacher, 32"]
    assert (students - teachers).square().mean() < 0.5 * (students - teachers.roll(1, dims=0)).square().mean()
    assert values["rows"]["student, 4"][1] < values["rows"]["teacher, 32"][1]


def test_distil_and_compare_tells_of_the_demo() -> None:
    """The phases that it says it leaves out, and the guidance by which it asks the teacher, are those of the configs."""
    said, code = (text("distil_and_compare.ipynb", kind) for kind in ("markdown", "code"))
    said = " ".join(said.split())
    demo = yaml.safe_load((config_directory() / "shapes_meanflow.yaml").read_text())
    shared = yaml.safe_load((config_directory() / "shapes_student.yaml").read_text())
    start = demo["model"]["init_args"]["alignment"]["init_args"]["start_step"]
    assert f"from step {start} on, distributions are matched" in said
    assert f"`STEPS = {demo['trainer']['max_steps']}` is the demo's number" in said
    assert int(re.findall(r"^STEPS = (\d+)", code, flags=re.MULTILINE)[0]) < start
    assert f'"true_cfg_scale": {shared["model"]["init_args"]["guidance"]["scale"]}' in code


@pytest.mark.slow
def test_a_method_of_your_own(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its method trains from its config, by the losses that its text describes, and its student draws without it."""
    values = run("a_method_of_your_own.ipynb", STEPS=30, PROMPTS_PER_CATEGORY=1)
    try:
        t, loss = values["first"].t, values["first"].loss.detach()
        assert loss[t < 0.5].mean() < 0.5 * loss[t > 0.8].mean()

        directory = elsewhere / values["RUN"]
        assert {"logs", "images.png", "student", "summary.json"} <= {path.name for path in directory.iterdir()}
        assert values["summary"]["student"].keys() == STUDENT
        assert values["summary"]["teacher"].keys() == TEACHER
        assert falls(values["curve"]("train/loss"))
        assert falls(values["curve"]("train/landing_error"))
        assert falls(values["curve"]("val/average_velocity_error"))
        assert {name.split(".")[0] for name in values["checkpoint"]["state_dict"]} == {"student", "ema"}
        assert values["student"].scheduler.config.stochastic_sampling
        assert {tuple(pictures.shape) for pictures in values["drawn"].values()} == {(len(values["PROMPTS"]), 3, 32, 32)}

        check_settings(values["LandingRegression"], values["CONFIG"], capsys)
    finally:
        sys.modules.pop("landing", None)


def check_settings(method: Any, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What the text says of the method's settings: they are on the command line, checked, and go with FLUX.1-dev."""
    capsys.readouterr()  # what training has printed
    with pytest.raises(SystemExit):
        main(["fit", "--config", "landing.yaml", "--model.teacher_steps=5", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["teacher_steps"] == 5
    with pytest.raises(SystemExit):
        main(["fit", "--config", "landing.yaml", "--model.teacher_steps=many", "--print_config"])
    assert "teacher_steps" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match="LandingRegression does not train it"):
        method(DiffusersAdapter("shapes-teacher"), guidance=Guidance(kind="improved"), caption_dropout=0.1)

    settings = yaml.safe_load(config)
    Path("flux_landing.yaml").write_text(yaml.safe_dump({"base": "flux_student.yaml", "model": settings["model"]}))
    with pytest.raises(SystemExit):
        main(["fit", "--config", "flux_landing.yaml", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"] == "landing.LandingRegression"
    assert printed["model"]["init_args"]["adapter"]["init_args"]["pretrained"] == "black-forest-labs/FLUX.1-dev"
