"""Training with sharded networks equals training in one process, and resumes from checkpoints of any number of processes."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_distill.teachers import DiffusersAdapter
from lightning_distill.teachers.student_options import StudentOptions
from tests.sharding.tiny_runs import ALL_NETWORKS, SEVERAL_RUNS, STRATEGIES, largest_difference, train

pytestmark = SEVERAL_RUNS


@pytest.fixture(scope="module")
def single(pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return train(tmp_path_factory.mktemp("single") / "run", pretrained, *ALL_NETWORKS)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_equal_one_and_resume_exactly(
    strategy: str, pretrained: str, single: dict[str, Tensor], tmp_path: Path
) -> None:
    """Student, critic and EMA agree after three steps with a derivative, a joint pass and checkpointed blocks."""
    options = ["--strategy", strategy, "--devices", "2", *ALL_NETWORKS]
    sharded = train(tmp_path / "sharded", pretrained, *options)
    assert {name.partition(".")[0] for name in sharded} == {"student", "critic", "ema"}
    assert largest_difference(single, sharded) < 1e-5
    facts = json.loads((tmp_path / "sharded" / "facts.json").read_text())
    assert facts["teacher_local"] < 0.51 * facts["teacher_total"]
    assert facts.get("bucket") == facts.get("trained")  # ZeRO-3 bounds its buffer by the size of all gradients

    checkpoint = str(tmp_path / "sharded" / "last.ckpt")  # saved at the second step
    resumed = train(tmp_path / "resumed", pretrained, *options, "--resume", checkpoint)
    assert largest_difference(sharded, resumed) == 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("devices", ["1", "3"])
def test_another_number_of_processes_resumes(
    devices: str, strategy: str, pretrained: str, single: dict[str, Tensor], tmp_path: Path
) -> None:
    train(tmp_path / "two", pretrained, "--strategy", strategy, "--devices", "2", *ALL_NETWORKS)
    checkpoint = str(tmp_path / "two" / "last.ckpt")
    options = ["--strategy", strategy, "--devices", devices, *ALL_NETWORKS]
    assert largest_difference(single, train(tmp_path / "resumed", pretrained, *options, "--resume", checkpoint)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2_offload", "deepspeed_stage_3_offload", "deepspeed_stage_3_offload_optimizer"])
def test_cpu_offload_equals_one_process_and_resumes_exactly(
    strategy: str, pretrained: str, single: dict[str, Tensor], tmp_path: Path
) -> None:
    options = ["--strategy", strategy, "--devices", "2", *ALL_NETWORKS]
    sharded = train(tmp_path / "sharded", pretrained, *options)
    assert largest_difference(single, sharded) < 1e-5
    resumed = train(tmp_path / "resumed", pretrained, *options, "--resume", str(tmp_path / "sharded" / "last.ckpt"))
    assert largest_difference(sharded, resumed) == 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "settings",
    [["--solution", "discrete"], ["--solution", "bootstrapped"], [], ["--accumulate", "2", "--aligned", "--ema"]],
    ids=["discrete", "bootstrapped", "not-checkpointed", "accumulated"],
)
def test_other_settings_equal_one_process(settings: list[str], strategy: str, pretrained: str, tmp_path: Path) -> None:
    one = train(tmp_path / "one", pretrained, *settings)
    two = train(tmp_path / "two", pretrained, "--strategy", strategy, "--devices", "2", *settings)
    assert largest_difference(one, two) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pretrained_students_equal_one_process(strategy: str, pretrained: str, tmp_path: Path) -> None:
    adapter = DiffusersAdapter(pretrained)
    adapter.check()
    adapter.load()
    student, _ = adapter.build_student(adapter.load_teacher(), StudentOptions())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05
    adapter.save_student(student, tmp_path / "student")
    settings = ["--ema", "--student", str(tmp_path / "student")]
    one = train(tmp_path / "one", pretrained, *settings)
    two = train(tmp_path / "two", pretrained, "--strategy", strategy, "--devices", "2", *settings)
    assert largest_difference(one, two) < 1e-5
    change = max((one[f"student.{name}"] - parameter).abs().max().item() for name, parameter in student.named_parameters())
    assert change < 0.01  # three steps change a weight by at most 0.001 each


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", ["DMD2", "TDM"])
def test_methods_with_a_critic_equal_one_process(method: str, strategy: str, pretrained: str, tmp_path: Path) -> None:
    settings = ["--method", method, "--checkpointing", "--ema"]
    one = train(tmp_path / "one", pretrained, *settings)
    options = ["--strategy", strategy, "--devices", "2", *settings]
    two = train(tmp_path / "two", pretrained, *options)
    assert {name.partition(".")[0] for name in two} == {"student", "critic", "ema"}
    assert largest_difference(one, two) < 5e-5  # learning rates are 1e-3; differences of predictions round more
    resumed = train(tmp_path / "resumed", pretrained, *options, "--resume", str(tmp_path / "two" / "last.ckpt"))
    assert largest_difference(two, resumed) == 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mixed_precision_equals_one_process(strategy: str, pretrained: str, tmp_path: Path) -> None:
    settings = ["--precision", "bf16-mixed", "--checkpointing", "--ema"]
    one = train(tmp_path / "one", pretrained, *settings)
    two = train(tmp_path / "two", pretrained, "--strategy", strategy, "--devices", "2", *settings)
    float32 = train(tmp_path / "float32", pretrained, "--checkpointing", "--ema")
    assert largest_difference(one, two) < 0.5 * largest_difference(one, float32)
