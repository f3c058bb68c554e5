"""Mixtures of experts over two processes, whose tokens go to different ones."""

import json
from pathlib import Path

import pytest
from torch import Tensor

from tests.models.hunyuan_image3 import save_stand_in
from tests.strategies.test_sharded import largest_difference, train

APART = ["--apart", "--checkpointing"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_stand_in("newer", tmp_path_factory.mktemp("published") / "many", num_experts=32, moe_topk=1)


@pytest.fixture(scope="module")
def single(directory: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return train(tmp_path_factory.mktemp("single") / "run", directory, *APART, "--accumulate", "2")


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("deepspeed_stage_3", marks=pytest.mark.slow)])
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
