from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.times import Uniform
from lightning_distill.methods import LADD, AuxiliaryLoss, Guidance
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.sharding.strategies import FSDP2Strategy
from lightning_distill.teachers.model_adapter import ModelAdapter
from tests.methods.gaussian_adapter import GAUSSIAN, GaussianAdapter
from tests.methods.gaussian_runs import (
    VALIDATION,
    Captions,
    adam,
    assert_learns_moments_of_the_data,
    assert_restores_auxiliary_networks,
    build,
    data_samples,
    empty_captions,
    loader,
    trainer,
    unguided,
)

ONE_STEP: dict[str, Any] = {"nfe": 1, "step_weights": (1.0,), "warmup_steps": 0}


def method(student: str = "small", **settings: Any) -> LADD:
    return LADD(GaussianAdapter(student), validation=VALIDATION, **{"hidden": 32, "teacher_steps": 8, **settings})


def train_heads(module: LADD, real: Tensor, fake: Tensor, steps: int) -> dict[str, Tensor]:
    """Train the heads on real samples and samples of the student; returns the logs of the last step."""
    for _ in range(steps):
        loss, logs = module.heads_loss(real, fake, unguided(len(real)))
        module.auxiliary.step(AuxiliaryLoss("heads", loss))
    return logs


def test_trained_heads_separate_samples_and_darken_bright_ones() -> None:
    torch.manual_seed(0)
    module = build(method(discriminator_lr=1e-2, time_sampler=Uniform(high=0.5)))
    real = data_samples(256)
    bright = torch.full_like(real, 2.0).requires_grad_()
    logs = train_heads(module, real, bright.detach(), steps=40)
    assert logs["score_real"] > logs["score_fake"] + 0.5
    (gradient,) = torch.autograd.grad(module.adversarial_loss(bright, unguided(256)).sum(), bright)
    assert gradient.mean() > 0  # a descent step darkens


@pytest.mark.parametrize("real", ["teacher", "data"])
def test_training_learns_mean_and_standard_deviation_of_the_data(real: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"discriminator_lr": 1e-2, "time_sampler": Uniform(high=0.5), "optimizer": adam(1e-2), "ema_decay": None}
    assert_learns_moments_of_the_data(build(method(real=real, **settings, **ONE_STEP)), tmp_path, steps=300)


def test_r1_penalty_flattens_the_heads() -> None:
    slopes, real = [], data_samples(64)
    for weight in (1e-6, 10.0):
        torch.manual_seed(0)
        module = build(method(discriminator_lr=1e-2, r1_weight=weight))
        slopes.append(train_heads(module, real, torch.full_like(real, 2.0), steps=40)["r1"].item())
    assert slopes[1] < slopes[0] / 3
    module = build(method(r1_weight=0.0))
    assert "r1" not in train_heads(module, real, real, steps=1)


def test_teacher_samples_are_guided() -> None:
    module = build(method("exact", teacher_steps=64, guidance=Guidance(scale=3.0)))
    condition = GuidedCondition({"caption": torch.full((512,), -0.1)}, empty_captions(512), torch.full((512,), 3.0))
    x0 = module.teacher_samples(torch.full((512, 3, 4, 4), torch.nan), condition)
    assert x0.mean().item() > GAUSSIAN.mean + 0.1  # guidance triples the caption's value of -0.1 in the velocity
    assert not x0.requires_grad


def test_start_times_are_grid_times_and_only_the_cleaner_half_in_the_warmup() -> None:
    module = build(method(warmup_steps=5))
    like = torch.zeros(4000, 3, 4, 4)
    assert set(module.sample_steps(like).tolist()) == {0.5, 0.25}
    module.warmup_steps = 0
    times = module.sample_steps(like)
    assert set(times.tolist()) == {1.0, 0.75, 0.5, 0.25}
    assert (times == 1).float().mean().item() == pytest.approx(0.7, abs=0.05)


def test_objective_has_no_gradient_in_the_heads() -> None:
    module = build(method("exact"))
    module.evaluate_objective(torch.full((8, 3, 4, 4), torch.nan), empty_captions(8)).loss.mean().backward()
    assert module.student.bias.grad.abs() > 0
    assert all(parameter.grad is None for parameter in module.heads.parameters())
    assert module.adapter.stochastic_sampling


def test_checkpoint_restores_the_heads(tmp_path: Path) -> None:
    assert_restores_auxiliary_networks(method, {"heads"}, tmp_path)


def test_only_real_data_need_images(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=1).fit(method(real="teacher"), datamodule=Captions())
    with pytest.raises(ConfigurationError, match="Captions, which has no images, and LADD trains on them"):
        trainer(tmp_path).fit(method(real="data"), datamodule=Captions())


def test_sharded_networks_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    module = method()
    monkeypatch.setattr(GaussianAdapter, "supports_sharding", True)
    module._trainer = SimpleNamespace(strategy=FSDP2Strategy(), callbacks=[])
    with pytest.raises(
        ConfigurationError,
        match=r"FSDP2Strategy, which shards networks, .* LADD \(heads\) needs unsharded features; set trainer",
    ):
        module.setup("fit")
    assert not module.networks.built


def test_adapter_without_features_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        ({"guidance": Guidance(kind="improved"), "caption_dropout": 0.1}, "guidance.kind is improved"),
    ],
)
def test_error_for_invalid_settings_names_the_setting(settings: Any, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        method(**settings)
