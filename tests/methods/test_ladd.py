from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.times import Uniform
from lightning_distill.methods import LADD, Guidance
from lightning_distill.sharding import FSDP2Strategy
from lightning_distill.teachers.model_adapter import ModelAdapter
from tests.methods.gaussian_adapter import GAUSSIAN, GaussianAdapter
from tests.methods.gaussian_runs import adam, assert_it_learns_the_data, assert_restores, built, nothing_said
from tests.methods.test_meanflow import VALIDATION, Captions, loader, trainer

ONE_STEP: dict[str, Any] = {"nfe": 1, "step_weights": (1.0,), "warmup_steps": 0}


def method(student: str = "small", **settings: Any) -> LADD:
    return LADD(GaussianAdapter(student), validation=VALIDATION, **{"hidden": 32, "teacher_steps": 8, **settings})


def test_the_heads_learn_and_the_student_is_pulled_to_what_is_real() -> None:
    torch.manual_seed(0)
    module = built(method(discriminator_lr=1e-2, time_sampler=Uniform(high=0.5)))
    real = GAUSSIAN.mean + GAUSSIAN.std * torch.randn(256, 3, 4, 4)
    bright = torch.full_like(real, 2.0).requires_grad_()
    for _ in range(40):
        logs = module.update_heads(real, bright.detach(), nothing_said(256))
    assert logs["score_real"] > logs["score_fake"] + 0.5
    (gradient,) = torch.autograd.grad(module.adversarial_loss(bright, nothing_said(256)).sum(), bright)
    assert gradient.mean() > 0  # a descent step darkens


@pytest.mark.parametrize("real", ["teacher", "data"])
def test_training_takes_on_the_mean_and_the_spread_of_what_is_real(real: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"discriminator_lr": 1e-2, "time_sampler": Uniform(high=0.5), "optimizer": adam(1e-2), "ema_decay": None}
    assert_it_learns_the_data(built(method(real=real, **settings, **ONE_STEP)), tmp_path, steps=300)


def test_the_penalty_keeps_the_heads_flat() -> None:
    slopes = []
    real = GAUSSIAN.mean + GAUSSIAN.std * torch.randn(64, 3, 4, 4)
    for weight in (1e-6, 10.0):
        torch.manual_seed(0)
        module = built(method(discriminator_lr=1e-2, r1_weight=weight))
        for _ in range(40):
            logs = module.update_heads(real, torch.full_like(real, 2.0), nothing_said(64))
        slopes.append(logs["r1"].item())
    assert slopes[1] < slopes[0] / 3
    module = built(method(r1_weight=0.0))
    assert "r1" not in module.update_heads(real, real, nothing_said(64))


def test_samples_of_the_teacher_are_the_guided_teachers() -> None:
    module = built(method("exact", teacher_steps=64, guidance=Guidance(scale=3.0)))
    condition = nothing_said(512)
    condition = type(condition)({"caption": torch.full((512,), -0.1)}, condition.null, torch.full((512,), 3.0))
    x0 = module.teacher_samples(torch.full((512, 3, 4, 4), torch.nan), condition)
    assert x0.mean().item() > GAUSSIAN.mean + 0.1  # a caption of -0.1 is worth three times as much in the velocity
    assert not x0.requires_grad


def test_steps_are_drawn_from_the_grid_and_the_cleaner_half_first(tmp_path: Path) -> None:
    module = built(method(warmup_steps=5))
    module.trainer = trainer(tmp_path)
    like = torch.zeros(4000, 3, 4, 4)
    assert set(module.sample_steps(like).tolist()) == {0.5, 0.25}
    module.warmup_steps = 0
    drawn = module.sample_steps(like)
    assert set(drawn.tolist()) == {1.0, 0.75, 0.5, 0.25}
    assert (drawn == 1).float().mean().item() == pytest.approx(0.7, abs=0.05)


def test_the_students_backward_pass_leaves_the_heads_alone(tmp_path: Path) -> None:
    module = built(method("exact"))
    module.trainer = trainer(tmp_path)
    module.objective(torch.full((8, 3, 4, 4), torch.nan), {"caption": torch.zeros(8)}).loss.mean().backward()
    assert module.student.bias.grad.abs() > 0
    assert all(parameter.grad is None for parameter in module.heads.parameters())
    assert module.adapter.stochastic_sampling


def test_a_checkpoint_has_the_heads(tmp_path: Path) -> None:
    assert_restores(method, {"heads"}, tmp_path)


def test_what_is_real_decides_what_data_it_needs(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=1).fit(method(real="teacher"), datamodule=Captions())
    with pytest.raises(ConfigurationError, match="Captions, which has no pictures, and LADD trains on them"):
        trainer(tmp_path).fit(method(real="data"), datamodule=Captions())


def test_it_is_refused_where_it_cannot_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = method()
    monkeypatch.setattr(GaussianAdapter, "supports_sharding", True)
    monkeypatch.setattr(LADD, "sharding", FSDP2Strategy())
    with pytest.raises(ConfigurationError, match=r"which FSDP2Strategy takes apart; set trainer\.strategy to auto or ddp"):
        module.setup("fit")
    assert not hasattr(module, "student")
    monkeypatch.undo()
    monkeypatch.setattr(GaussianAdapter, "feature_widths", ModelAdapter.feature_widths)
    with pytest.raises(ConfigurationError, match="adapter is GaussianAdapter, which provides no features"):
        trainer(tmp_path).fit(method(), loader())


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"real": "both"}, "model.real"),
        ({"teacher_steps": 0}, "model.teacher_steps"),
        ({"nfe": 2}, "model.step_weights"),
        ({"step_weights": (1.0, 0.0, 0.0, -1.0)}, "model.step_weights"),
        ({"step_weights": (1.0, 0.0, 0.0, 0.0)}, "model.warmup_steps"),
        ({"warmup_steps": -1}, "model.warmup_steps"),
        ({"discriminator_lr": 0.0}, "model.discriminator_lr"),
        ({"r1_weight": -1.0}, "model.r1_weight"),
        ({"guidance": Guidance(kind="improved"), "caption_dropout": 0.1}, "guidance.kind improved"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings: Any, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        method(**settings)
