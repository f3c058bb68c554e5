import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch.nn.functional import smooth_l1_loss
from torch.utils.data import DataLoader

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import interpolate
from lightning_distill.methods import Guidance, MeanFlow, Objective, TimestepRescaling
from lightning_distill.teachers import DiffusersAdapter
from lightning_distill.teachers.student_options import StudentOptions
from tests.methods.gaussian_adapter import GaussianAdapter
from tests.methods.gaussian_runs import build
from tests.tiny import PROMPTS, save_tiny_pipeline

RESCALED = StudentOptions(time_embedding="rescaled")
SHAPE = (16, 8, 8)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return save_tiny_pipeline(tmp_path_factory.mktemp("teacher"))


def method(pretrained: str, **settings: Any) -> Any:
    module = TimestepRescaling(
        DiffusersAdapter(pretrained), **{"student": RESCALED, "guidance": Guidance("two_branch", 2.0), **settings}
    )
    return build(module)


def evaluate(module: TimestepRescaling) -> Objective:
    torch.manual_seed(1)
    return module.objective(torch.randn(3, *SHAPE), module.encoder.encode_prompt(PROMPTS))


def test_loss_compares_the_velocities_of_student_and_teacher(pretrained: str) -> None:
    module = method(pretrained)
    objective = evaluate(module)
    torch.manual_seed(1)
    x0 = torch.randn(3, *SHAPE)
    t = module.time_sampler(3, x0.device)
    x_t = interpolate(x0, torch.randn_like(x0), t)
    condition, null = module.encoder.encode_prompt(PROMPTS), module.encoder.encode_prompt([""] * 3)
    with torch.no_grad():
        target = module.adapter.guided_velocity(module.teacher, x_t, t, condition, null, torch.full((3,), 2.0))
        v = module.adapter.average_velocity(module.student, x_t, t, t, condition, torch.full((3,), 2.0))
    expected = torch.stack([smooth_l1_loss(*each) for each in zip(v, target, strict=True)])
    torch.testing.assert_close(objective.loss, expected)
    torch.testing.assert_close(objective.logs["relative_error"], (v - target).norm() / target.norm())
    assert objective.logs["relative_error"] > 1e-3  # the teacher's weights alone do not fit the rescaled times
    assert torch.equal(objective.t, t)


def test_training_approaches_the_teacher_and_freezes_the_interval_embedder(pretrained: str, tmp_path: Path) -> None:
    module = method(pretrained, ema_decay=0.5, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3))
    before = evaluate(module)
    started = {name: value.clone() for name, value in module.student.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    samples = [
        {"image": torch.rand(3, 32, 32, generator=generator) * 2 - 1, "prompt": PROMPTS[i % 3], "index": i} for i in range(240)
    ]
    trainer = Trainer(
        max_steps=40, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(samples, batch_size=6))
    after = evaluate(module)
    assert after.logs["relative_error"] < 0.7 * before.logs["relative_error"]
    for name, value in module.student.named_parameters():
        frozen = "interval_embedder" in name
        assert torch.equal(value, started[name]) == frozen, name
    x, t = torch.randn(3, *SHAPE), torch.tensor([0.9, 0.6, 0.3])
    condition, student = module.encoder.encode_prompt(PROMPTS), module.networks.sampling_student
    with torch.no_grad():
        velocities = [module.adapter.average_velocity(student, x, r, t, condition, 2.0) for r in (t, 0 * t)]
    assert torch.equal(*velocities)


def test_other_methods_start_from_a_rescaled_student(pretrained: str, tmp_path: Path) -> None:
    first = method(pretrained)
    with torch.no_grad():
        for parameter in first.student.parameters():
            parameter += 0.01
    first.adapter.save_student(first.student, tmp_path / "student")
    settings = StudentOptions(time_embedding="rescaled", pretrained=str(tmp_path / "student"))
    module = MeanFlow(DiffusersAdapter(pretrained), student=settings)
    build(module)
    expected = dict(first.student.named_parameters())
    for name, parameter in module.student.named_parameters():
        assert torch.equal(parameter, expected[name]), name
        assert parameter.requires_grad, name


def test_rescaled_times_without_a_rescaled_student_are_an_error(pretrained: str) -> None:
    module = MeanFlow(DiffusersAdapter(pretrained), student=RESCALED)
    with pytest.raises(
        ConfigurationError, match=r"time_embedding is rescaled.*by TimestepRescaling first.*student\.pretrained"
    ):
        module.setup("fit")


@pytest.mark.parametrize("time_embedding", ["smooth", "original"])
def test_other_time_embeddings_are_an_error(pretrained: str, time_embedding: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"time_embedding is {time_embedding}, and TimestepRescaling.*to rescaled"):
        TimestepRescaling(DiffusersAdapter(pretrained), student=StudentOptions(time_embedding=time_embedding))


def test_rescaled_times_on_a_family_without_them_are_an_error() -> None:
    module = TimestepRescaling(GaussianAdapter("small"), student=RESCALED)
    with pytest.raises(ConfigurationError, match="which GaussianAdapter does not support; choose smooth or original"):
        module.setup("fit")


def test_time_frequency_of_rescaled_students_is_at_least_2_pi(pretrained: str) -> None:
    adapter = DiffusersAdapter(pretrained)
    assert adapter.time_frequency(RESCALED) == pytest.approx(2 * math.pi)
    assert adapter.time_frequency(StudentOptions(time_embedding="original")) == 1000.0
