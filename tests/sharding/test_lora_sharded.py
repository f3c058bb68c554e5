"""LoRA students of two processes that share the teacher's weights compute what they do in one, and gather a block at a time."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from tests.sharding.test_sharded import largest_difference, train
from tests.teachers.tiny_families import FAMILIES, save_family
from tests.tiny import save_tiny_pipeline

EVERYTHING = ["--lora", "2", "--aligned", "--ema", "--checkpointing"]
SPREAD = ["--strategy", "fsdp2", "--devices", "2"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return save_tiny_pipeline(tmp_path_factory.mktemp("teacher"))


Run = tuple[Path, dict[str, Tensor]]
"""Where a run was, and what it ended with."""


@pytest.fixture(scope="module")
def single(pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("single") / "run"
    return path, train(path, pretrained, *EVERYTHING)


@pytest.fixture(scope="module")
def whole(pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Of two processes."""
    path = tmp_path_factory.mktemp("whole") / "run"
    return path, train(path, pretrained, *SPREAD, *EVERYTHING)


def test_two_processes_equal_one_and_resume_exactly(pretrained: str, single: Run, whole: Run, tmp_path: Path) -> None:
    """Derivative, fused pass, checkpointed blocks, critic and average, after three steps on one frozen base."""
    path, found = whole
    assert {name.partition(".")[0] for name in found} == {"student", "critic", "ema"}
    assert largest_difference(single[1], found) < 1e-5
    facts = json.loads((path / "facts.json").read_text())
    assert facts["teacher"] < 0.51 * facts["teacher_of_all"]
    assert facts["gathered"] == ["block", "block", "root"]  # what computes, what is fetched, and what is outside all blocks
    assert facts["still_gathered"] == 0
    resumed = train(tmp_path / "resumed", pretrained, *SPREAD, *EVERYTHING, "--resume", str(path / "last.ckpt"))
    assert largest_difference(found, resumed) == 0


def test_they_are_exported_like_those_of_one_process(single: Run, whole: Run) -> None:
    one, two = (torch.load(path / "merged.pt") for path, _ in (single, whole))
    assert largest_difference(one, two) < 1e-5
    base = {name: value for name, value in whole[1].items() if name.startswith("student.") and "base_layer.weight" in name}
    assert base
    for name, value in base.items():
        assert not torch.equal(two[name.removeprefix("student.").replace(".base_layer", "")], value)


def test_checkpoints_hold_what_trains(whole: Run) -> None:
    metadata = FileSystemReader(whole[0] / "last.ckpt").read_metadata().state_dict_metadata
    weights = {name.removeprefix("weights.") for name in metadata if name.startswith("weights.")}
    expected = {
        name.replace("critic.", "alignment.critic.", 1) if name.startswith("critic.") else name
        for name in whole[1]
        if "lora_" in name or "timestep_embedder" in name or "interval" in name
    }
    assert weights == expected | {"ema.n_averaged"}
    assert not [name for name in metadata if name.startswith("kept.")]


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["1", "3"])
def test_another_number_of_processes_goes_on(devices: str, pretrained: str, single: Run, whole: Run, tmp_path: Path) -> None:
    settings = ["--strategy", "fsdp2", "--devices", devices, *EVERYTHING, "--resume", str(whole[0] / "last.ckpt")]
    assert largest_difference(single[1], train(tmp_path / "on", pretrained, *settings)) < 1e-5


@pytest.mark.slow
def test_what_is_kept_on_the_cpu_computes_the_same(pretrained: str, single: Run, tmp_path: Path) -> None:
    settings = ["--strategy", "fsdp2_offload", "--devices", "2", *EVERYTHING]
    assert largest_difference(single[1], train(tmp_path / "offloaded", pretrained, *settings)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["--lora", "2", "--solution", "discrete"],
        ["--lora", "2", "--aligned", "--ema"],
        ["--lora", "2", "--accumulate", "2", "--aligned", "--ema"],
    ],
    ids=["discrete", "not-checkpointed", "accumulated"],
)
def test_other_settings_equal_one_process(settings: list[str], pretrained: str, tmp_path: Path) -> None:
    one = train(tmp_path / "one", pretrained, *settings)
    assert largest_difference(one, train(tmp_path / "two", pretrained, *SPREAD, *settings)) < 1e-5


@pytest.mark.slow
def test_a_critic_of_low_rank_stands_beside_a_whole_student(pretrained: str, tmp_path: Path) -> None:
    """Both by fsdp2: a whole student that is not read from files takes random numbers, which change the critic's start."""
    settings = ["--strategy", "fsdp2", "--critic-lora", "2", "--aligned", "--ema", "--checkpointing"]
    one, two = (train(tmp_path / devices, pretrained, *settings, "--devices", devices) for devices in ("1", "2"))
    assert [name for name in one if name.startswith("critic.") and "lora_" in name]
    assert largest_difference(one, two) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_base_of_16_bits_trains_like_one_process(precision: str, pretrained: str, tmp_path: Path) -> None:
    settings = [*EVERYTHING, "--dtype", "bfloat16", "--precision", precision]
    one, two = train(tmp_path / "one", pretrained, *settings), train(tmp_path / "two", pretrained, *SPREAD, *settings)
    assert {name: value.dtype for name, value in one.items()} == {name: value.dtype for name, value in two.items()}
    # Gradients are added up in another order, which 16 bits show; updates start at zero, and are compared as a whole.
    updates = [torch.cat([value.flatten() for name, value in run.items() if "lora_B" in name]) for run in (one, two)]
    assert (updates[0] - updates[1]).norm() < 0.1 * updates[0].norm()
    frozen = [name for name in one if name.endswith("base_layer.weight")]
    assert frozen
    assert all(torch.equal(one[name], two[name]) for name in frozen)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_one_process(family: str, tmp_path: Path) -> None:
    directory = save_family(family, tmp_path / "teacher")
    settings = ["--lora", "2", "--checkpointing", "--steps", "2"]
    one = train(tmp_path / "one", directory, *settings)
    assert largest_difference(one, train(tmp_path / "two", directory, *SPREAD, *settings)) < 1e-5
