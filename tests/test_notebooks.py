"""Notebooks run from top to bottom, agree with their text, and have no outputs in git."""

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
"""Numbers of steps at which runs on the embedded teacher measure the two networks."""


def cells(name: str, kind: str = "code") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((NOTEBOOKS / name).read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def text(name: str, kind: str) -> str:
    """Text of all cells of a kind, "markdown" or "code"."""
    return "\n".join("".join(cell["source"]) for cell in cells(name, kind))


def run(name: str, **settings: int) -> dict[str, Any]:
    """Run a notebook, whose cells are plain Python, and return its variables.

    Args:
        name: File of the notebook.
        **settings: New values of numbers that the notebook assigns, each in a separate line.
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
    """Whether the mean of the last third of a curve is below that of the first third, from a step on."""
    values = [value for step, value in zip(*curve, strict=True) if step >= since]
    third = len(values) // 3
    assert third, "too few values"
    return mean(values[-third:]) < mean(values[:third])


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory from which Python imports modules, as in a notebook."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")))
def test_outputs_are_empty(name: str) -> None:
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells(name))


@pytest.mark.slow
def test_meanflow_in_two_dimensions() -> None:
    """The identity holds, and students of average velocities reach the data in one step, as the text says."""
    values = run("meanflow_in_two_dimensions.ipynb")
    assert values["error"] < 1e-3
    assert values["without"] > 0.5
    one_step = {target: found[1] for target, found in values["distances"].items()}
    assert one_step["flow matching"] > 0.8
    assert max(one_step["discrete"], one_step["differential"]) < 0.4


@pytest.mark.slow
def test_distil_and_compare(elsewhere: Path) -> None:
    """Student and teacher are measured at the same steps, and the same noise gives the same scene."""
    values = run("distil_and_compare.ipynb", STEPS=30, PROMPTS_PER_CATEGORY=1)
    directory = elsewhere / values["RUN"]
    assert [path.name for path in elsewhere.iterdir()] == ["runs"]
    assert [path.name for path in (elsewhere / "runs").iterdir()] == [directory.name]
    assert {"images.png", "student", "summary.json"} <= {path.name for path in directory.iterdir()}

    summary = values["summary"]
    assert summary["student"].keys() == STUDENT
    assert summary["teacher"].keys() == TEACHER
    assert summary["teacher"]["32"] > max(0.7, summary["teacher"]["1"])
    assert falls(values["curve"]("train/loss"), since=20)
    assert falls(values["curve"]("val/average_velocity_error"))

    rows = {name: images for name, (images, _) in values["rows"].items()}
    assert {tuple(images.shape) for images in rows.values()} == {(len(values["PROMPTS"]), 3, 32, 32)}
    students, teachers = rows["student, 4"], rows["teacher, 32"]
    assert (students - teachers).square().mean() < 0.5 * (students - teachers.roll(1, dims=0)).square().mean()
    assert values["rows"]["student, 4"][1] < values["rows"]["teacher, 32"][1]


def test_distil_and_compare_agrees_with_the_configs() -> None:
    """The phases that the text describes, and the guidance of the teacher, are those of the configs."""
    prose, code = (text("distil_and_compare.ipynb", kind) for kind in ("markdown", "code"))
    prose = " ".join(prose.split())
    demo = yaml.safe_load((config_directory() / "shapes_meanflow.yaml").read_text())
    shared = yaml.safe_load((config_directory() / "shapes_student.yaml").read_text())
    start = demo["model"]["init_args"]["alignment"]["init_args"]["start_step"]
    assert f"From step {start} on, distribution matching is added" in prose
    assert f"The demo has `STEPS = {demo['trainer']['max_steps']}`" in prose
    assert int(re.findall(r"^STEPS = (\d+)", code, flags=re.MULTILINE)[0]) < start
    assert f'"true_cfg_scale": {shared["model"]["init_args"]["guidance"]["scale"]}' in code


@pytest.mark.slow
def test_a_method_of_your_own(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The method trains from its config, logs the curves of the text, and exports a student that samples without it."""
    values = run("a_method_of_your_own.ipynb", STEPS=30, PROMPTS_PER_CATEGORY=1)
    try:
        t, loss = values["first"].t, values["first"].loss.detach()
        assert loss[t < 0.5].mean() < 0.5 * loss[t > 0.8].mean()

        directory = elsewhere / values["RUN"]
        assert {"images.png", "student", "summary.json"} <= {path.name for path in directory.iterdir()}
        assert values["summary"]["student"].keys() == STUDENT
        assert values["summary"]["teacher"].keys() == TEACHER
        assert falls(values["curve"]("train/loss"))
        assert falls(values["curve"]("train/x0_error"))
        assert falls(values["curve"]("val/average_velocity_error"))
        weights = values["checkpoint"]["state_dict"]
        assert {".".join(name.split(".")[:2]) for name in weights} == {"networks.student", "networks.ema"}
        assert values["student"].scheduler.config.stochastic_sampling
        assert {tuple(images.shape) for images in values["images"].values()} == {(len(values["PROMPTS"]), 3, 32, 32)}

        check_settings(values["OneStepRegression"], values["CONFIG"], capsys)
    finally:
        sys.modules.pop("one_step", None)


def check_settings(method: Any, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings of the method are on the command line with type checks, and combine with a config of FLUX.1-dev."""
    capsys.readouterr()  # discards the output of training
    with pytest.raises(SystemExit):
        main(["fit", "--config", "one_step.yaml", "--model.teacher_steps=5", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["teacher_steps"] == 5
    with pytest.raises(SystemExit):
        main(["fit", "--config", "one_step.yaml", "--model.teacher_steps=many", "--print_config"])
    assert "teacher_steps" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match="OneStepRegression does not train it"):
        method(DiffusersAdapter("shapes-teacher"), guidance=Guidance(kind="improved"), caption_dropout=0.1)

    settings = yaml.safe_load(config)
    Path("flux_one_step.yaml").write_text(yaml.safe_dump({"base": "flux_student.yaml", "model": settings["model"]}))
    with pytest.raises(SystemExit):
        main(["fit", "--config", "flux_one_step.yaml", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"] == "one_step.OneStepRegression"
    assert printed["model"]["init_args"]["adapter"]["init_args"]["pretrained"] == "black-forest-labs/FLUX.1-dev"
