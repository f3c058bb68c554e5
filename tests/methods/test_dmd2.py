from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow import Uniform
from lightning_distill.methods import DMD2, CriticGan
from lightning_distill.methods.critic import TrajectoryState
from lightning_distill.optimizers import WarmupCosine
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
    evaluate_with_steps_of,
    loader,
    trainer,
    unguided,
)

GAN = CriticGan(hidden=16)
SHORT_RUN: dict[str, Any] = {"nfe": (1,), "critic_lr": 1e-2, "critic_clip": 1.0, "critic_updates": 2, "optimizer": adam(1e-2)}


def method(student: str = "small", **settings: Any) -> DMD2:
    return DMD2(GaussianAdapter(student), validation=VALIDATION, **settings)


def test_rolled_out_states_have_the_distribution_of_samples() -> None:
    """Training rolls out as sampling does: predict x0 and re-noise, with gradient through the last step only."""
    module = build(method("exact", nfe=(2,)))
    noise, starts = torch.randn(4096, 3, 4, 4), set()
    for seed in range(8):
        torch.manual_seed(seed)
        state, start = module.roll_out(noise, unguided(4096))
        starts.add(start[0].item())
        assert (state.s == 0).all()
        assert state.x_s.mean().item() == pytest.approx(GAUSSIAN.mean, abs=0.01)
        assert state.x_s.std().item() == pytest.approx(GAUSSIAN.std, abs=0.01)
        (gradient,) = torch.autograd.grad(state.x_s.sum(), module.student.bias)
        assert gradient.item() == pytest.approx(-start[0].item() * noise.numel())
    assert starts == {1.0, 0.5}
    assert module.adapter.stochastic_sampling


def test_trained_discriminator_separates_samples_and_darkens_bright_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = build(method("small", gan=GAN, critic_lr=1e-2, critic_updates=1))
    x0 = data_samples(256)
    bright = torch.full_like(x0, 2.0).requires_grad_()
    state = TrajectoryState(bright, torch.zeros(256))
    monkeypatch.setattr(module, "roll_out", lambda *_: (state, torch.ones(256)))
    for _ in range(60):
        logs = evaluate_with_steps_of({"heads"}, module, x0).logs
    assert logs["score_real"] > logs["score_fake"] + 0.5
    (gradient,) = torch.autograd.grad(module.adversarial_loss(state, unguided(256)).sum(), bright)
    assert gradient.mean() > 0  # a descent step darkens


def test_adversarial_loss_has_gradients_in_the_student_only() -> None:
    module = build(method("exact", gan=GAN))
    state, _ = module.roll_out(torch.randn(8, 3, 4, 4), unguided(8))
    module.adversarial_loss(state, unguided(8)).mean().backward()
    assert module.student.bias.grad.abs() > 0
    assert all(parameter.grad is None for part in (module.heads, module.matching.critic) for parameter in part.parameters())


def test_critic_loss_contains_that_of_the_discriminator(monkeypatch: pytest.MonkeyPatch) -> None:
    module, losses = build(method(gan=GAN, critic_updates=2)), []
    monkeypatch.setattr(module.matching, "critic_loss", lambda *_: torch.zeros((), requires_grad=True))
    module.auxiliary.set_optimizer("matching.critic", SimpleNamespace(step=losses.append))
    objective = module.evaluate_objective(torch.randn(8, 3, 4, 4), empty_captions(8))
    assert len(losses) == 2
    assert all(loss.item() == pytest.approx(GAN.critic_weight * 2 * 0.693, rel=0.2) for loss in losses)
    gradients = torch.autograd.grad(losses[-1], list(module.matching.critic.parameters()), allow_unused=True)
    assert any(gradient is not None and gradient.any() for gradient in gradients)
    assert objective.logs["adversarial_loss"] > 0


def test_matching_and_discriminator_have_separate_noise_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    matching, discriminator = Uniform(0.1, 0.2), Uniform(0.7, 0.8)
    module = build(method(gan=CriticGan(hidden=16, time_sampler=discriminator), time_sampler=matching))
    times: dict[str, list[Tensor]] = {"critic": [], "teacher": [], "features": []}

    def record(name: str, function: str, place: int) -> None:
        original = getattr(GaussianAdapter, function)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if name != "critic" or args[1] is module.matching.critic:
                times[name].append(args[place])
            return original(*args, **kwargs)

        monkeypatch.setattr(GaussianAdapter, function, recorded)

    record("teacher", "velocity", 3)
    record("features", "features", 4)
    record("critic", "average_velocity", 4)
    module.evaluate_objective(torch.randn(64, 3, 4, 4), empty_captions(64))
    for name, sampler in (("critic", matching), ("teacher", matching), ("features", discriminator)):
        tau = torch.cat(times[name])
        assert sampler.low <= tau.min() < tau.max() <= sampler.high


def test_training_with_discriminator_learns_mean_and_standard_deviation_of_the_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert_learns_moments_of_the_data(build(method(gan=GAN, **SHORT_RUN)), tmp_path, steps=150)


def test_critic_and_heads_train_while_the_student_lr_is_0(tmp_path: Path) -> None:
    module = build(
        method(gan=GAN, critic_lr=1e-2, optimizer=adam(1e-2), lr_scheduler=lambda o: WarmupCosine(o, 100, hold_steps=3))
    )
    parts = {"student": module.student, "critic": module.matching.critic, "heads": module.heads}

    def changed(steps: int) -> set[str]:
        before = {name: parameters_to_vector(part.parameters()).detach().clone() for name, part in parts.items()}
        trainer(tmp_path, max_steps=steps).fit(module, loader())
        return {name for name, part in parts.items() if not parameters_to_vector(part.parameters()).equal(before[name])}

    assert changed(3) == {"critic", "heads"}
    assert changed(4) == {"student", "critic", "heads"}


def test_other_divergence_scales_the_matching_gradient_of_each_sample() -> None:
    torch.manual_seed(0)
    plain = build(method("exact", gan=GAN))
    weighted = build(method("exact", gan=CriticGan(hidden=16, divergence="forward_kl")))
    assert plain.divergence_weight is None
    state, _ = weighted.roll_out(torch.randn(8, 3, 4, 4), unguided(8))
    with torch.no_grad():
        for head in weighted.heads.heads:
            head.score[-1].weight.mul_(30)
    gradients = []
    for module in (plain, weighted):
        torch.manual_seed(1)
        x = state.x_s.detach().requires_grad_()
        weight = module._weight(module.divergence_weight, unguided(8)) if module.divergence_weight else None
        loss = weighted.matching.student_loss(weighted.networks, TrajectoryState(x, state.s), unguided(8), weight)
        gradients += torch.autograd.grad(loss.sum(), x)
    rows = (gradients[1] / gradients[0]).flatten(1)
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows), rtol=1e-3, atol=1e-3)
    assert rows[:, 0].std() > 0.05


def test_training_by_another_divergence_learns_mean_and_standard_deviation_of_the_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gan = CriticGan(hidden=16, divergence="jensen_shannon")
    assert_learns_moments_of_the_data(build(method(gan=gan, **SHORT_RUN)), tmp_path, steps=150)


def test_checkpoint_restores_critic_and_heads(tmp_path: Path) -> None:
    gan = CriticGan(hidden=16, divergence="jensen_shannon")
    assert_restores_auxiliary_networks(lambda: method(gan=gan, critic_lr=1e-2), {"matching.critic", "heads"}, tmp_path)


def test_discriminator_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Captions, which has no images, and DMD2 trains on them"):
        trainer(tmp_path).fit(method(gan=GAN), datamodule=Captions())


def test_discriminator_with_sharded_networks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    module = method(gan=GAN)
    monkeypatch.setattr(GaussianAdapter, "supports_sharding", True)
    module._trainer = SimpleNamespace(strategy=FSDP2Strategy(), callbacks=[])
    with pytest.raises(
        ConfigurationError,
        match=r"FSDP2Strategy, which shards networks, .* DMD2 \(heads\) needs unsharded features; set trainer",
    ):
        module.setup("fit")
    assert not module.networks.built


def test_discriminator_on_an_adapter_without_features_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GaussianAdapter, "feature_widths", ModelAdapter.feature_widths)
    with pytest.raises(ConfigurationError, match="adapter is GaussianAdapter, which provides no features"):
        trainer(tmp_path).fit(method(gan=GAN), loader())


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"student_weight": 0.0}, "gan.student_weight"),
        ({"critic_weight": -1.0}, "gan.critic_weight"),
        ({"hidden": 0}, "gan.hidden"),
        ({"lr": 0.0}, "gan.lr"),
        ({"divergence": "kl"}, "choose one of reverse_kl, softened_reverse_kl"),
    ],
)
def test_error_for_invalid_discriminator_settings_names_the_setting(settings: Any, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        CriticGan(**settings)
