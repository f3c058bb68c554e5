"""The structure of the package: what CONTRIBUTING promises, as tests."""

import ast
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_distill
from lightning_distill import methods
from lightning_distill.methods import MeanFlow, TeacherStudentBase
from tests.methods.gaussian_adapter import GaussianAdapter
from tests.methods.gaussian_runs import VALIDATION

PACKAGE = Path(lightning_distill.__file__).parent
ROOT = PACKAGE.parent
METHODS = [kind for kind in vars(methods).values() if isinstance(kind, type) and issubclass(kind, LightningModule)]
FORMULAS = "flow"
"""Folder of pure functions, each one formula with its source: a reader of a training step need not open them."""


def sources() -> Iterator[tuple[str, Path, ast.Module]]:
    """Dotted name, file and syntax tree of each module of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("lightning_distill", *path.relative_to(PACKAGE).with_suffix("").parts)
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path, ast.parse(path.read_text())


def imported_modules(name: str, path: Path, tree: ast.Module, known: set[str]) -> set[str]:
    """Modules of the package that a module imports, within functions and for type checkers as well."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            inner = {f"{module}.{alias.name}" for alias in node.names}
            found |= (inner & known) or {module}
    return (found & known) - {name}


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_methods_have_at_most_three_classes_of_the_package_in_their_mro(kind: type[LightningModule]) -> None:
    own = [base.__name__ for base in kind.__mro__ if base.__module__.startswith("lightning_distill.")]
    assert len(own) <= 3, own


def test_no_import_cycles() -> None:
    modules = list(sources())
    known = {name for name, _, _ in modules}
    graph = {name: imported_modules(name, path, tree, known) for name, path, tree in modules}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(done) > 100


def own_private_names(tree: ast.Module) -> set[str]:
    """Private functions, classes, methods and attributes that a module defines."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def test_no_private_names_of_other_modules() -> None:
    """Private names of libraries are not meant; those of a class may be used by its subclasses."""
    modules = list(sources())
    private = {name: own_private_names(tree) for name, _, tree in modules}
    owners = (LightningModule(), Trainer, torch.Tensor, ModelMixin, DiffusionPipeline, ModelCheckpoint, os)
    libraries = {*chain.from_iterable(map(dir, owners)), "_modules", "_parameters"}
    everywhere = set().union(*private.values()) - libraries
    found = []
    for name, path, tree in modules:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("lightning_distill")):
                names = [alias.name for alias in node.names if alias.name.startswith("_") and not alias.name.endswith("__")]
                found += [f"{path.relative_to(ROOT)}:{node.lineno} imports {each}" for each in names]
            elif isinstance(node, ast.Attribute) and node.attr in everywhere - private[name]:
                owner = node.value.id if isinstance(node.value, ast.Name) else ""
                if owner not in ("self", "cls") and not isinstance(node.value, ast.Call):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} uses {ast.unparse(node)}")
    assert not found


def test_planner_callbacks_and_strategies_ask_methods_through_their_interface() -> None:
    """No attribute of a method is looked up by its name."""
    attributes = {
        name for kind in METHODS for base in kind.__mro__ for name in vars(base) if base.__module__.startswith("light")
    }
    for path in (PACKAGE / "methods").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
                attributes.add(node.attr)
    lookups = []
    for name, path, tree in sources():
        if name.split(".")[1:2] not in (["planning"], ["callbacks"], ["sharding"], ["export"], ["commands"]):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
                attribute = node.args[1]
                if isinstance(attribute, ast.Constant) and attribute.value in attributes:
                    lookups.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    allowed = ("loggers", "precision", "device", "dtype", "strategy", "datamodule")  # of trainers, tensors and plug-ins
    assert not [each for each in lookups if not any(f"'{name}'" in each for name in allowed)]


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, set[tuple[str, int]]]]:
    """Functions that a training step of MeanFlow calls, by solution and file: name and first line."""
    module = MeanFlow(
        GaussianAdapter("small", teacher="small"), validation=VALIDATION, equal_fraction=0.25, trajectory_fraction=0.5
    )
    module.setup("fit")
    module.configure_model()
    module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    batch = {"prompt": ["a red circle"] * 32, "image": torch.randn(32, 3, 4, 4), "index": torch.arange(32)}
    called: dict[str, dict[str, set[tuple[str, int]]]] = {}
    for solution in module.phases:
        module.phase = solution
        files = called[solution] = defaultdict(set)

        def note(frame: FrameType, event: str, arg: Any, files: Any = files) -> None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(PACKAGE):
                files[str(path.relative_to(PACKAGE))].add((frame.f_code.co_name, frame.f_code.co_firstlineno))

        torch.manual_seed(0)
        sys.setprofile(note)
        try:
            loss = module.training_step(batch, 0)
        finally:
            sys.setprofile(None)
        assert loss.isfinite()
    return called


def definitions(path: Path) -> dict[str, list[tuple[int, int]]]:
    """First and last lines of the functions and classes of a file, by name."""
    found = defaultdict(list)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name].append((first, node.end_lineno or first))
    return found


@pytest.mark.parametrize("solution", MeanFlow.phases)
def test_a_step_of_meanflow_is_short(steps: dict[str, dict[str, set[tuple[str, int]]]], solution: str) -> None:
    """At most 6 files and 450 lines, docstrings included, from the batch to the loss; the formulas of `flow` aside."""
    files = {name: called for name, called in steps[solution].items() if not name.startswith(FORMULAS)}
    lines = 0
    for name, called in files.items():
        spans = definitions(PACKAGE / name)
        lines += sum(
            last - first + 1 for function, line in called for first, last in spans.get(function, []) if first <= line <= last
        )
    assert len(files) <= 6, sorted(files)
    assert lines <= 450


def references() -> list[tuple[str, str, int, int]]:
    """Name, file, first and last line of each reference in CONTRIBUTING's walk."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.findall(r"\[`([\w.]+)`\]\(([\w./]+\.py)#L(\d+)-L(\d+)\)", text)
    return [(name, path, int(first), int(last)) for name, path, first, last in found]


def test_the_walk_names_the_right_lines() -> None:
    assert len(references()) > 10
    wrong = []
    for name, path, first, last in references():
        spans = definitions(ROOT / path).get(name.rpartition(".")[2], [])
        if (first, last) not in spans:
            wrong.append(f"{path} {name}: {spans}, not {first} to {last}")
    assert not wrong


def test_the_walk_visits_every_file_of_a_step(steps: dict[str, dict[str, set[tuple[str, int]]]]) -> None:
    visited = {path for _, path, _, _ in references()}
    for called in steps.values():
        assert {f"lightning_distill/{name}" for name in called if not name.startswith(FORMULAS)} <= visited


def test_a_users_method_needs_only_an_objective() -> None:
    assert TeacherStudentBase.__abstractmethods__ == frozenset({"objective"})


GLOSSARY = re.compile(
    r"\b(pictures?|lent|lends|likewise|spread over|side network|side training|goes? to data and back|held routing"
    r"|is told|are told|is lent|without memory|guard that takes back)\b",
    re.IGNORECASE,
)
"""Words that the field has others for: image, shared, sharded, auxiliary network, re-noise, frozen routing, meta device."""


def prose_files() -> list[Path]:
    return [*sorted(PACKAGE.rglob("*.py")), *sorted((ROOT / "configs").glob("*.yaml")), ROOT / "CONTRIBUTING.md"]


def test_code_and_configs_use_the_words_of_the_field() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in prose_files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for match in [GLOSSARY.search(line)]
        if match
    ]
    assert not found
