"""Notebooks run from top to bottom, and lie in git without what they have printed."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def cells(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((NOTEBOOKS / name).read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def run(name: str) -> dict[str, Any]:
    """Names and values at the end of a notebook, whose cells are plain Python."""
    values: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(name):
        exec(compile("".join(cell["source"]), name, "exec"), values)
    plt.close("all")
    return values


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
