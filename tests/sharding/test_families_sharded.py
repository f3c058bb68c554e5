"""Every family under every strategy of several processes: two compute what one does."""

from pathlib import Path

import pytest
from torch import Tensor

from tests.sharding.test_sharded import STRATEGIES, largest_difference, train
from tests.teachers.hunyuan_image3.tiny_pipeline import FORMS
from tests.teachers.tiny_families import FAMILIES, save_family


@pytest.fixture(scope="module", params=[*FAMILIES, *FORMS])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_family(request.param, tmp_path_factory.mktemp("family") / request.param)


@pytest.fixture(scope="module")
def single(directory: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return train(tmp_path_factory.mktemp("single") / "run", directory, "--checkpointing", "--steps", "2")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_trains_spread_over_two_processes(strategy: str, directory: str, single: dict[str, Tensor], tmp_path: Path) -> None:
    settings = ["--strategy", strategy, "--devices", "2", "--checkpointing", "--steps", "2"]
    assert largest_difference(single, train(tmp_path / "run", directory, *settings)) < 1e-5


@pytest.mark.slow
def test_ddp_trains_like_one_process(directory: str, single: dict[str, Tensor], tmp_path: Path) -> None:
    """DDP refuses a second step if a weight that trains got no gradient in the first."""
    settings = ["--strategy", "ddp", "--devices", "2", "--checkpointing", "--steps", "2"]
    assert largest_difference(single, train(tmp_path / "run", directory, *settings)) < 1e-5
