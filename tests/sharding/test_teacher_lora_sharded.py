"""LoRA that is merged into sharded teachers, and sharded students without an interval input: as in one process."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_distill.teachers import TeacherLora
from tests.sharding.tiny_runs import SEVERAL_RUNS, STRATEGIES, largest_difference, train
from tests.teachers.lora_files import random_factors, save_lora
from tests.tiny import load_adapter

pytestmark = SEVERAL_RUNS
TIME = "time_text_embed.timestep_embedder.linear_2"


@pytest.fixture(scope="module")
def files(pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two files; the first also updates a time embedder."""
    folder = tmp_path_factory.mktemp("lora")
    factors = [random_factors(pretrained, 0, TIME), random_factors(pretrained, 1)]
    return [save_lora(each, folder / f"{i}.safetensors") for i, each in enumerate(factors)]


def options(files: list[str], *further: str) -> list[str]:
    return [part for file in files for part in ("--teacher-lora", file)] + ["--steps", "2", *further]


@pytest.fixture(scope="module")
def single(pretrained: str, files: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return train(tmp_path_factory.mktemp("single") / "run", pretrained, *options(files))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sharded_training_equals_one_process(
    strategy: str, pretrained: str, files: list[str], single: dict[str, Tensor], tmp_path: Path
) -> None:
    sharded = train(tmp_path / "run", pretrained, *options(files, "--strategy", strategy, "--devices", "2"))
    assert largest_difference(single, sharded) < 1e-5


@pytest.mark.slow
def test_other_lora_gives_other_weights(pretrained: str, single: dict[str, Tensor], tmp_path: Path) -> None:
    assert largest_difference(single, train(tmp_path / "run", pretrained, *options([]))) > 1e-3


@pytest.mark.slow
def test_shared_base_of_a_lora_student_is_the_merged_teacher(pretrained: str, files: list[str], tmp_path: Path) -> None:
    """In bfloat16: each process reads rows, whose sums and rounding are those of the whole weight."""
    settings = options(files, "--lora", "2", "--dtype", "bfloat16")
    one = train(tmp_path / "one", pretrained, *settings)
    two = train(tmp_path / "two", pretrained, *settings, "--strategy", "fsdp2", "--devices", "2")
    frozen = [name for name in one if name.endswith("base_layer.weight")]
    assert frozen
    assert all(torch.equal(one[name], two[name]) for name in frozen)
    adapter = load_adapter(pretrained, torch_dtype="bfloat16", lora=[TeacherLora(file, 0.5) for file in files])
    teacher = adapter.load_teacher().state_dict()
    for name in frozen:
        assert torch.equal(one[name], teacher[name.removeprefix("student.").replace(".base_layer", "")]), name


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "lora"), [("fsdp2", 0), ("fsdp2", 2), ("deepspeed_stage_3", 0)])
def test_students_without_an_interval_input_equal_one_process(
    strategy: str, lora: int, pretrained: str, files: list[str], tmp_path: Path
) -> None:
    settings = options(files, "--one-time", "--method", "DMD2", "--lora", str(lora), "--ema")
    one = train(tmp_path / "one", pretrained, *settings)
    two = train(tmp_path / "two", pretrained, *settings, "--strategy", strategy, "--devices", "2")
    assert largest_difference(one, two) < 5e-5  # as in `test_sharded.py`: differences of predictions round more
    adapter = load_adapter(pretrained, lora=[TeacherLora(file, 0.5) for file in files])
    teacher = adapter.load_teacher().state_dict()
    for name in (each for each in two if each.startswith("student.") and "timestep_embedder" in each):
        assert torch.equal(two[name], teacher[name.removeprefix("student.")])
