"""LoRA students on a sharded teacher's weights equal those of one process, and gather one block at a time."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from tests.sharding.tiny_runs import ALL_NETWORKS, SEVERAL_RUNS, largest_difference, train
from tests.teachers.tiny_families import FAMILIES, save_family

pytestmark = SEVERAL_RUNS
LORA = ["--lora", "2", *ALL_NETWORKS]
SHARDED = ["--strategy", "fsdp2", "--devices", "2"]


Run = tuple[Path, dict[str, Tensor]]
"""Directory and final weights of a run."""


@pytest.fixture(scope="module")
def single(pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("single") / "run"
    return path, train(path, pretrained, *LORA)


@pytest.fixture(scope="module")
def sharded(pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two processes."""
    path = tmp_path_factory.mktemp("sharded") / "run"
    return path, train(path, pretrained, *SHARDED, *LORA)


def test_two_processes_equal_one_and_resume_exactly(pretrained: str, single: Run, sharded: Run, tmp_path: Path) -> None:
    """Student, critic and EMA on one frozen base agree after three steps with a derivative, a joint pass and checkpointing."""
    path, weights = sharded
    assert {name.partition(".")[0] for name in weights} == {"student", "critic", "ema"}
    assert largest_difference(single[1], weights) < 1e-5
    facts = json.loads((path / "facts.json").read_text())
    assert facts["teacher_local"] < 0.51 * facts["teacher_total"]
    assert facts["gathered"] == ["block", "block", "root"]  # the current block, the prefetched one, and the root
    assert facts["still_gathered"] == 0
    resumed = train(tmp_path / "resumed", pretrained, *SHARDED, *LORA, "--resume", str(path / "last.ckpt"))
    assert largest_difference(weights, resumed) == 0


def test_export_equals_that_of_one_process(single: Run, sharded: Run) -> None:
    one, two = (torch.load(path / "merged.pt") for path, _ in (single, sharded))
    assert largest_difference(one, two) < 1e-5
    base = {name: value for name, value in sharded[1].items() if name.startswith("student.") and "base_layer.weight" in name}
    assert base
    for name, value in base.items():
        assert not torch.equal(two[name.removeprefix("student.").replace(".base_layer", "")], value)


def test_checkpoints_hold_only_trained_weights(sharded: Run) -> None:
    metadata = FileSystemReader(sharded[0] / "last.ckpt").read_metadata().state_dict_metadata
    weights = {name.removeprefix("weights.") for name in metadata if name.startswith("weights.")}
    paths = {"student": "networks.student", "critic": "alignment.critic", "ema": "networks.ema"}
    expected = set()
    for name in sharded[1]:
        if "lora_" in name or "timestep_embedder" in name or "interval" in name:
            network, _, rest = name.partition(".")
            expected.add(f"{paths[network]}.{rest}")
    assert weights == expected | {"networks.ema.n_averaged"}
    assert not [name for name in metadata if name.startswith("snapshot.")]


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["1", "3"])
def test_another_number_of_processes_resumes(devices: str, pretrained: str, single: Run, sharded: Run, tmp_path: Path) -> None:
    settings = ["--strategy", "fsdp2", "--devices", devices, *LORA, "--resume", str(sharded[0] / "last.ckpt")]
    assert largest_difference(single[1], train(tmp_path / "resumed", pretrained, *settings)) < 1e-5


@pytest.mark.slow
def test_cpu_offload_equals_one_process(pretrained: str, single: Run, tmp_path: Path) -> None:
    settings = ["--strategy", "fsdp2_offload", "--devices", "2", *LORA]
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
    assert largest_difference(one, train(tmp_path / "two", pretrained, *SHARDED, *settings)) < 1e-5


@pytest.mark.slow
def test_lora_critic_of_a_full_student_equals_one_process(pretrained: str, tmp_path: Path) -> None:
    """Both runs use fsdp2: an unsharded full student takes random numbers, which changes the critic's start."""
    settings = ["--strategy", "fsdp2", "--critic-lora", "2", "--aligned", "--ema", "--checkpointing"]
    one, two = (train(tmp_path / devices, pretrained, *settings, "--devices", devices) for devices in ("1", "2"))
    assert [name for name in one if name.startswith("critic.") and "lora_" in name]
    assert largest_difference(one, two) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_bfloat16_base_equals_one_process(precision: str, pretrained: str, tmp_path: Path) -> None:
    settings = [*LORA, "--dtype", "bfloat16", "--precision", precision]
    one, two = train(tmp_path / "one", pretrained, *settings), train(tmp_path / "two", pretrained, *SHARDED, *settings)
    assert {name: value.dtype for name, value in one.items()} == {name: value.dtype for name, value in two.items()}
    # Gradients are summed in another order, which rounds differently in 16 bits. LoRA updates start at zero, so they are
    # compared jointly.
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
    assert largest_difference(one, train(tmp_path / "two", directory, *SHARDED, *settings)) < 1e-5
