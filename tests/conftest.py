"""Settings and fixtures of all tests."""

import os

# Before torch is imported: idle threads must not spin beside other workers, and no test may need a network.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import full_config

from tests.family_table import FamilyTable
from tests.processes import ROOT, remove_distributed_variables

LONG = {"planning", "sharding", "test_meanflow_resume.py", "test_resume.py", "test_shipped.py"}
"""Directories and files with most of the tests that take several seconds."""


@pytest.fixture(scope="session", autouse=True)
def remote_code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give each test process a cache of its own for the code of checkpoints.

    diffusers and transformers copy it to one directory of the user and import it from there: of two such directories in
    `sys.path`, the first would hide the packages of the second.
    """
    with pytest.MonkeyPatch.context() as patch:
        directory = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", directory)
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", directory)
        yield


@pytest.fixture(scope="session")
def demo() -> dict[str, Any]:
    """All settings of the demo, as the benchmarks read them."""
    return full_config("shapes_meanflow.yaml")


@pytest.fixture
def adamw_8bit() -> Any:
    """The optimizer of torchao, which is not installed for all tests: diffusers then loads it at every start."""
    return pytest.importorskip("torchao.optim", reason='pip install -c constraints.txt -e ".[8bit]"').AdamW8bit


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--family-table FILE`: where the table of what families have passed is to be brought up to date."""
    parser.addoption("--family-table", type=Path, help="Markdown file with a marked table of families")


def pytest_configure(config: pytest.Config) -> None:
    """Collect outcomes, in the process that workers report to."""
    if config.getoption("--family-table") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FamilyTable(config.getoption("--family-table")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: the workers then finish at nearly the same time."""
    items.sort(key=lambda item: item.path.relative_to(ROOT / "tests").parts[0] not in LONG)


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """The same numbers in whatever order tests run, on one thread so that workers do not crowd each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_process_group_left() -> Iterator[None]:
    """Remove the process group and the environment variables that a test leaves: later tests of the worker would join them."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    remove_distributed_variables()
