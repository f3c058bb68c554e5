"""Every model family under every distributed strategy: training in two processes equals training in one."""

from pathlib import Path

import pytest
from torch import Tensor

from tests.sharding.tiny_runs import SEVERAL_RUNS, STRATEGIES, largest_difference, train
from tests.teachers.hunyuan_image3.tiny_pipeline import FORMS
from tests.teachers.tiny_families import FAMILIES, save_family

pytestmark = SEVERAL_RUNS


@pytest.fixture(scope="module", params=[*FAMILIES, *FORMS])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_family(request.param, tmp_path_factory.mktemp("family") / request.param)


@pytest.fixture(scope="module")
def single(directory: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return train(tmp_path_factory.mktemp("single") / "run", directory, "--checkpointing", "--steps", "2")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sharded_training_equals_one_process(strategy: str, directory: str, single: dict[str, Tensor], tmp_path: Path) -> None:
    settings = ["--strategy", strategy, "--devices", "2", "--checkpointing", "--steps", "2"]
    assert largest_difference(single, train(tmp_path / "run", directory, *settings)) < 1e-5


@pytest.mark.slow
def test_ddp_equals_one_process(directory: str, single: dict[str, Tensor], tmp_path: Path) -> None:
    """DDP raises an error at the second step if a trained weight had no gradient in the first one."""
    settings = ["--strategy", "ddp", "--devices", "2", "--checkpointing", "--steps", "2"]
    assert largest_difference(single, train(tmp_path / "run", directory, *settings)) < 1e-5
