"""Mixtures of experts over two processes, whose tokens go to different ones."""

import json
from pathlib import Path

import pytest
from torch import Tensor

from tests.sharding.test_sharded import EVERYTHING, STRATEGIES, largest_difference, train
from tests.teachers.hunyuan_image3.tiny_pipeline import save_stand_in

APART = ["--apart", "--checkpointing", "--steps", "2"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_stand_in("newer", tmp_path_factory.mktemp("published") / "many", num_experts=32, moe_topk=1)


@pytest.fixture(scope="module")
def single(directory: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return train(tmp_path_factory.mktemp("single") / "run", directory, *APART, "--accumulate", "2")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_experts_may_have_tokens_in_one_process_alone(
    strategy: str, directory: str, single: dict[str, Tensor], tmp_path: Path
) -> None:
    """Each process has a sample of its own, and one process both, a pass each."""
    found = train(tmp_path / "run", directory, *APART, "--strategy", strategy, "--devices", "2")
    assert largest_difference(single, found) < 1e-5
    idle = [
        {i for i, tokens in enumerate(json.loads((tmp_path / "run" / f"tokens{rank}.json").read_text())) if tokens == 0}
        for rank in (0, 1)
    ]
    assert idle[0] - idle[1]
    assert idle[1] - idle[0]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "settings", [EVERYTHING, ["--aligned", "--ema", "--accumulate", "2"]], ids=["checkpointed", "accumulated"]
)
def test_all_networks_equal_those_of_one_process_and_resume(settings: list[str], strategy: str, tmp_path: Path) -> None:
    """Of a form that embeds guidance and has a token for r: student, critic and average, after three steps."""
    directory = save_stand_in("newer_distilled", tmp_path / "published")
    one = train(tmp_path / "one", directory, *settings)
    sharded = ["--strategy", strategy, "--devices", "2", *settings]
    two = train(tmp_path / "two", directory, *sharded)
    assert {name.partition(".")[0] for name in two} == {"student", "critic", "ema"}
    assert largest_difference(one, two) < 1e-5
    facts = json.loads((tmp_path / "two" / "facts.json").read_text())
    assert facts["teacher"] < 0.51 * facts["teacher_of_all"]
    resumed = train(tmp_path / "resumed", directory, *sharded, "--resume", str(tmp_path / "two" / "last.ckpt"))
    assert largest_difference(two, resumed) == 0
