"""Mixtures of experts sharded over two processes whose tokens are routed to different experts."""

import json
from pathlib import Path

import pytest
from torch import Tensor

from tests.sharding.tiny_runs import ALL_NETWORKS, SEVERAL_RUNS, STRATEGIES, largest_difference, train
from tests.teachers.hunyuan_image3.tiny_pipeline import save_stand_in

pytestmark = SEVERAL_RUNS
ONE_SAMPLE = ["--one-sample-per-process", "--checkpointing", "--steps", "2"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_stand_in("newer", tmp_path_factory.mktemp("published") / "many", num_experts=32, moe_topk=1)


@pytest.fixture(scope="module")
def single(directory: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return train(tmp_path_factory.mktemp("single") / "run", directory, *ONE_SAMPLE, "--accumulate", "2")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_experts_without_tokens_in_one_process_equal_one_process(
    strategy: str, directory: str, single: dict[str, Tensor], tmp_path: Path
) -> None:
    """Two processes have one sample each; one process has both samples, in two accumulated passes."""
    sharded = train(tmp_path / "run", directory, *ONE_SAMPLE, "--strategy", strategy, "--devices", "2")
    assert largest_difference(single, sharded) < 1e-5
    idle = [
        {i for i, tokens in enumerate(json.loads((tmp_path / "run" / f"tokens{rank}.json").read_text())) if tokens == 0}
        for rank in (0, 1)
    ]
    assert idle[0] - idle[1]
    assert idle[1] - idle[0]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "settings", [ALL_NETWORKS, ["--aligned", "--ema", "--accumulate", "2"]], ids=["checkpointed", "accumulated"]
)
def test_all_networks_equal_one_process_and_resume_exactly(settings: list[str], strategy: str, tmp_path: Path) -> None:
    """Student, critic and EMA of a form with embedded guidance and a token for r agree after three steps."""
    directory = save_stand_in("newer_distilled", tmp_path / "published")
    one = train(tmp_path / "one", directory, *settings)
    options = ["--strategy", strategy, "--devices", "2", *settings]
    two = train(tmp_path / "two", directory, *options)
    assert {name.partition(".")[0] for name in two} == {"student", "critic", "ema"}
    assert largest_difference(one, two) < 1e-5
    facts = json.loads((tmp_path / "two" / "facts.json").read_text())
    assert facts["teacher_local"] < 0.51 * facts["teacher_total"]
    resumed = train(tmp_path / "resumed", directory, *options, "--resume", str(tmp_path / "two" / "last.ckpt"))
    assert largest_difference(two, resumed) == 0
