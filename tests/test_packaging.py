import re
import subprocess
import sys
import sysconfig
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import lightning_distill
from lightning_distill.digests import MANIFEST

ROOT = Path(__file__).parents[1]
MAX_WHEEL_BYTES = 11_000_000
"""The wheel has 10.1 MB. The float16 transformers of the teacher and the student take 6.8 MB of them, compressed."""
CODE = """
import torch
from lightning_distill.flow import flow_step

x = torch.zeros(2)
reveal_type(flow_step(x, x, x, x))
flow_step(x, x, x)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    source = directory / "source"  # the build writes its directories here, not into the checkout
    source.mkdir()
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE", "configs", "lightning_distill"):
        subprocess.run(["cp", "-r", ROOT / name, source], check=True)
    command = [sys.executable, "-c", build, directory]
    result = subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    assert "absent from" not in result.stdout + result.stderr
    (file,) = directory.glob("*.whl")
    return file


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


@pytest.mark.slow
def test_wheel_holds_all_modules_configs_and_pipelines(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_distill").rglob("*.py")}
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_distill" / "pretrained").rglob("*") if path.is_file()}
    configs = {f"lightning_distill/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert len(configs) > 1
    assert any(name.endswith(".safetensors") for name in shipped)
    assert not (package | shipped | configs | {"lightning_distill/py.typed"}) - names
    assert not [name for name in names if name.startswith(("tests", "configs"))]
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


@pytest.mark.slow
def test_wheel_metadata_has_the_version_and_urls(wheel: Path) -> None:
    fields = metadata(wheel)
    assert fields["Version"] == lightning_distill.__version__
    urls = dict(url.split(", ") for url in fields.get_all("Project-URL", []))
    assert {"Homepage", "Documentation", "Changelog", "Issues"} <= urls.keys()
    assert all(url.startswith(urls["Homepage"]) for url in urls.values())
    assert {"Author", "Author-email", "Maintainer", "Maintainer-email"}.isdisjoint(fields.keys())


@pytest.mark.slow
def test_type_checkers_read_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # torch; .pth files inside are not followed
    (tmp_path / "user.py").write_text(CODE)
    python = tmp_path / "venv" / "bin" / "python"
    command = [sys.executable, "-m", "mypy", "--config-file=", "--python-executable", python, "user.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert 'Revealed type is "torch._tensor.Tensor"' in result.stdout, result.stdout
    assert 'user.py:7: error: Missing positional argument "t" in call to "flow_step"' in result.stdout
    assert "Found 1 error in 1 file" in result.stdout


def test_pretrained_holds_no_code() -> None:
    files = {path for path in (ROOT / "lightning_distill" / "pretrained").rglob("*") if path.is_file()}
    assert {path.suffix for path in files if path.name != MANIFEST} == {".json", ".md", ".safetensors"}


def test_pre_commit_runs_the_commands_of_make_lint() -> None:
    (hooks,) = [repository["hooks"] for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]]
    makefile = (ROOT / "Makefile").read_text()
    section = makefile[makefile.index("\nlint:") : makefile.index("\ntest:")].strip().splitlines()[1:]
    commands = [line.strip().replace("$(RUN)", ".venv/bin/python -m").replace("$(VENV)", ".venv") for line in section if line]
    assert [hook["entry"] for hook in hooks] == commands


def test_every_dependency_has_a_comment() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    section = text[text.index("dependencies = [") : text.index("[project.optional-dependencies]")]
    lines = [line for line in section.splitlines()[1:] if line.strip().startswith('"')]
    assert len(lines) > 8
    assert all(re.search(r'>=.*",  # .{12,}', line) or re.search(r'",  # .{12,}', line) for line in lines)


def test_constraints_pin_every_dependency_once_for_each_python() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    parsed = [re.fullmatch(r'([\w.-]+)==([\w.]+)(?:; python_version (>=|<) "3\.11")?', line) for line in pins]
    assert all(parsed), [line for line, found in zip(pins, parsed, strict=True) if not found]
    for excluded in ("<", ">="):
        names = [found[1] for found in parsed if found[3] != excluded]
        assert len(names) == len(set(names))
        for package in ("torch", "lightning", "diffusers", "transformers", "jsonargparse", "pytest", "ruff", "mypy"):
            assert package in names
