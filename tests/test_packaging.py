import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lightning_distill

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_holds_all_modules_configs_and_pipelines(tmp_path):
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    source = tmp_path / "source"  # the build leaves its directories here, not in the checkout
    tracked = ("pyproject.toml", "setup.cfg", "README.md", "LICENSE", "configs", "lightning_distill")
    source.mkdir()
    for name in tracked:
        subprocess.run(["cp", "-r", ROOT / name, source], check=True)
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"lightning_distill-{lightning_distill.__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_distill").rglob("*.py")}
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_distill" / "pretrained").rglob("*") if path.is_file()}
    configs = {f"lightning_distill/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert len(configs) > 1
    assert any(name.endswith(".safetensors") for name in shipped)
    assert not (package | shipped | configs) - held
    assert not [name for name in held if name.startswith(("tests", "configs"))]


def test_every_dependency_says_why():
    text = (ROOT / "pyproject.toml").read_text()
    section = text[text.index("dependencies = [") : text.index("[project.optional-dependencies]")]
    lines = [line for line in section.splitlines()[1:] if line.strip().startswith('"')]
    assert len(lines) > 8
    assert all(re.search(r'>=.*",  # .{12,}', line) or re.search(r'",  # .{12,}', line) for line in lines)


def test_constraints_pin_every_dependency_once_for_each_python():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    parsed = [re.fullmatch(r'([\w.-]+)==([\w.]+)(?:; python_version (>=|<) "3\.11")?', line) for line in pins]
    assert all(parsed), [line for line, found in zip(pins, parsed, strict=True) if not found]
    for excluded in ("<", ">="):
        names = [found[1] for found in parsed if found[3] != excluded]
        assert len(names) == len(set(names))
        for package in ("torch", "lightning", "diffusers", "transformers", "jsonargparse", "pytest", "ruff", "mypy"):
            assert package in names
