"""Two processes that share every network compute what one computes, and go on from what any number of them has saved."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_distill.teachers import DiffusersAdapter
from lightning_distill.teachers.student_options import StudentOptions
from tests.tiny import save_tiny_pipeline

ROOT = Path(__file__).resolve().parents[2]
STRATEGIES = ["fsdp2", "deepspeed_stage_3"]
EVERYTHING = ["--aligned", "--ema", "--checkpointing"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return save_tiny_pipeline(tmp_path_factory.mktemp("teacher"))


def train(out: Path, pretrained: str, *arguments: str) -> dict[str, Tensor]:
    """The weights that a run ends with."""
    out.mkdir(parents=True)
    script = ROOT / "tests" / "strategies" / "train_tiny.py"
    command = [sys.executable, str(script), str(out), "--pretrained", pretrained, *arguments]
    modules = str(out.parent / "modules")  # where transformers copies the code of checkpoints that bring some
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": modules}
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "weights.pt")


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.fixture(scope="module")
def single(pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return train(tmp_path_factory.mktemp("single") / "run", pretrained, *EVERYTHING)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_equal_one_and_resume_exactly(
    strategy: str, pretrained: str, single: dict[str, Tensor], tmp_path: Path
) -> None:
    """Derivative, fused pass, checkpointed blocks, critic and average: all three networks, after three steps."""
    sharded = ["--strategy", strategy, "--devices", "2", *EVERYTHING]
    whole = train(tmp_path / "whole", pretrained, *sharded)
    assert {name.partition(".")[0] for name in whole} == {"student", "critic", "ema"}
    assert largest_difference(single, whole) < 1e-5
    facts = json.loads((tmp_path / "whole" / "facts.json").read_text())
    assert facts["teacher"] < 0.51 * facts["teacher_of_all"]
    assert facts.get("bucket") == facts.get("trained")  # of ZeRO-3: its buffer is no larger than the gradients

    checkpoint = str(tmp_path / "whole" / "last.ckpt")  # of the second step
    resumed = train(tmp_path / "resumed", pretrained, *sharded, "--resume", checkpoint)
    assert largest_difference(whole, resumed) == 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("devices", ["1", "3"])
def test_another_number_of_processes_goes_on(
    devices: str, strategy: str, pretrained: str, single: dict[str, Tensor], tmp_path: Path
) -> None:
    train(tmp_path / "two", pretrained, "--strategy", strategy, "--devices", "2", *EVERYTHING)
    checkpoint = str(tmp_path / "two" / "last.ckpt")
    sharded = ["--strategy", strategy, "--devices", devices, *EVERYTHING]
    assert largest_difference(single, train(tmp_path / "on", pretrained, *sharded, "--resume", checkpoint)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2_offload", "deepspeed_stage_3_offload", "deepspeed_stage_3_offload_optimizer"])
def test_what_is_kept_on_the_cpu_computes_the_same(
    strategy: str, pretrained: str, single: dict[str, Tensor], tmp_path: Path
) -> None:
    sharded = ["--strategy", strategy, "--devices", "2", *EVERYTHING]
    whole = train(tmp_path / "whole", pretrained, *sharded)
    assert largest_difference(single, whole) < 1e-5
    resumed = train(tmp_path / "resumed", pretrained, *sharded, "--resume", str(tmp_path / "whole" / "last.ckpt"))
    assert largest_difference(whole, resumed) == 0


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
def test_students_that_start_from_another_equal_one_process(strategy: str, pretrained: str, tmp_path: Path) -> None:
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
    moved = max((one[f"student.{name}"] - parameter).abs().max().item() for name, parameter in student.named_parameters())
    assert moved < 0.01  # three steps of at most 0.001 each away from where it started


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", ["DMD2", "TDM"])
def test_methods_with_a_critic_equal_one_process(method: str, strategy: str, pretrained: str, tmp_path: Path) -> None:
    settings = ["--method", method, "--checkpointing", "--ema"]
    one = train(tmp_path / "one", pretrained, *settings)
    sharded = ["--strategy", strategy, "--devices", "2", *settings]
    two = train(tmp_path / "two", pretrained, *sharded)
    assert {name.partition(".")[0] for name in two} == {"student", "critic", "ema"}
    assert largest_difference(one, two) < 5e-5  # of learning rates of 1e-3; differences of predictions round more
    resumed = train(tmp_path / "resumed", pretrained, *sharded, "--resume", str(tmp_path / "two" / "last.ckpt"))
    assert largest_difference(two, resumed) == 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mixed_precision_trains_like_one_process(strategy: str, pretrained: str, tmp_path: Path) -> None:
    settings = ["--precision", "bf16-mixed", "--checkpointing", "--ema"]
    one = train(tmp_path / "one", pretrained, *settings)
    two = train(tmp_path / "two", pretrained, "--strategy", strategy, "--devices", "2", *settings)
    apart = train(tmp_path / "float32", pretrained, "--checkpointing", "--ema")
    assert largest_difference(one, two) < 0.5 * largest_difference(one, apart)
