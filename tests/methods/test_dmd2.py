from pathlib import Path
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
from lightning_distill.sharding import FSDP2Strategy
from lightning_distill.teachers.model_adapter import ModelAdapter
from tests.methods.gaussian_adapter import GAUSSIAN, GaussianAdapter
from tests.methods.gaussian_runs import adam, assert_it_learns_the_data, assert_restores, built, nothing_said
from tests.methods.test_meanflow import VALIDATION, Captions, loader, trainer

GAN = CriticGan(hidden=16)


def method(student: str = "small", **settings: Any) -> DMD2:
    return DMD2(GaussianAdapter(student), validation=VALIDATION, **settings)


def test_it_is_trained_on_what_it_samples() -> None:
    """From noise to data, and back by fresh noise, as when it draws; asked for r = 0 only, with gradient through one step."""
    module = built(method("exact", nfe=(2,)))
    noise, last = torch.randn(4096, 3, 4, 4), set()
    for seed in range(8):
        torch.manual_seed(seed)
        state, start = module.roll_out(noise, nothing_said(4096))
        last.add(start[0].item())
        assert (state.s == 0).all()
        assert state.x_s.mean().item() == pytest.approx(GAUSSIAN.mean, abs=0.01)
        assert state.x_s.std().item() == pytest.approx(GAUSSIAN.std, abs=0.01)
        (gradient,) = torch.autograd.grad(state.x_s.sum(), module.student.bias)
        assert gradient.item() == pytest.approx(-start[0].item() * noise.numel())
    assert last == {1.0, 0.5}
    assert module.adapter.stochastic_sampling


def test_the_discriminator_learns_and_the_student_is_pulled_to_the_data() -> None:
    torch.manual_seed(0)
    module = built(method("small", gan=GAN, critic_lr=1e-2))
    x0 = GAUSSIAN.mean + GAUSSIAN.std * torch.randn(256, 3, 4, 4)
    bright = torch.full_like(x0, 2.0).requires_grad_()
    state, _ = module.roll_out(torch.randn_like(x0), nothing_said(256))
    state = type(state)(bright, state.s)
    for _ in range(60):
        _, logs = module.discriminator_loss(x0, state, nothing_said(256))
    assert logs["score_real"] > logs["score_fake"] + 0.5
    (gradient,) = torch.autograd.grad(module.adversarial_loss(state, nothing_said(256)).sum(), bright)
    assert gradient.mean() > 0  # a descent step darkens


def test_the_students_backward_pass_leaves_critic_and_heads_alone() -> None:
    module = built(method("exact", gan=GAN))
    state, _ = module.roll_out(torch.randn(8, 3, 4, 4), nothing_said(8))
    module.adversarial_loss(state, nothing_said(8)).mean().backward()
    assert module.student.bias.grad.abs() > 0
    assert all(parameter.grad is None for part in (module.heads, module.matching.critic) for parameter in part.parameters())


def test_the_critic_learns_from_the_discriminator_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    module = built(method(gan=GAN, critic_updates=2))
    losses = []
    monkeypatch.setattr(module.matching, "critic_loss", lambda *_: torch.zeros((), requires_grad=True))
    monkeypatch.setattr(module.matching.critic_training.optimizer(module.matching.critic), "step", losses.append)
    x0 = torch.randn(8, 3, 4, 4)
    objective = module.objective(x0, {"caption": torch.zeros(8)})
    assert len(losses) == 2
    assert all(loss.item() == pytest.approx(GAN.critic_weight * 2 * 0.693, rel=0.2) for loss in losses)
    gradients = torch.autograd.grad(losses[-1], list(module.matching.critic.parameters()), allow_unused=True)
    assert any(gradient is not None and gradient.any() for gradient in gradients)
    assert objective.logs["adversarial_loss"] > 0


def test_samples_are_compared_and_judged_at_noise_levels_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    compared, judged = Uniform(0.1, 0.2), Uniform(0.7, 0.8)
    module = built(method(gan=CriticGan(hidden=16, time_sampler=judged), time_sampler=compared))
    asked: dict[str, list[Tensor]] = {"critic": [], "teacher": [], "features": []}
    velocity, of_student, features = (getattr(GaussianAdapter, name) for name in ("velocity", "average_velocity", "features"))

    def note(name: str, of: Any, place: int) -> Any:
        return lambda *told, **named: asked[name].append(told[place]) or of(*told, **named)

    monkeypatch.setattr(GaussianAdapter, "velocity", note("teacher", velocity, 3))
    monkeypatch.setattr(GaussianAdapter, "features", note("features", features, 4))
    monkeypatch.setattr(
        GaussianAdapter,
        "average_velocity",
        lambda *told: (asked["critic"].append(told[4]) if told[1] is module.matching.critic else None) or of_student(*told),
    )
    module.objective(torch.randn(64, 3, 4, 4), {"caption": torch.zeros(64)})
    for name, sampler in (("critic", compared), ("teacher", compared), ("features", judged)):
        tau = torch.cat(asked[name])
        assert sampler.low <= tau.min() < tau.max() <= sampler.high


def test_training_with_the_discriminator_takes_on_the_mean_and_the_spread_of_the_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"nfe": (1,), "critic_lr": 1e-2, "critic_clip": 1.0, "critic_updates": 2, "optimizer": adam(1e-2)}
    assert_it_learns_the_data(built(method(gan=GAN, **settings)), tmp_path, steps=150)


def test_critic_and_heads_learn_alone_while_the_rate_is_held(tmp_path: Path) -> None:
    module = built(
        method(gan=GAN, critic_lr=1e-2, optimizer=adam(1e-2), lr_scheduler=lambda o: WarmupCosine(o, 100, hold_steps=3))
    )
    parts = {"student": module.student, "critic": module.matching.critic, "heads": module.heads}

    def moved(steps: int) -> set[str]:
        before = {name: parameters_to_vector(part.parameters()).detach().clone() for name, part in parts.items()}
        trainer(tmp_path, max_steps=steps).fit(module, loader())
        return {name for name, part in parts.items() if not parameters_to_vector(part.parameters()).equal(before[name])}

    assert moved(3) == {"critic", "heads"}
    assert moved(4) == {"student", "critic", "heads"}


def test_another_divergence_weighs_what_the_student_makes_too_rarely() -> None:
    """The matching gradient of a row is as many times DMD2's as the discriminator's ratio asks for."""
    torch.manual_seed(0)
    plain = built(method("exact", gan=GAN))
    weighted = built(method("exact", gan=CriticGan(hidden=16, divergence="forward_kl")))
    assert plain.divergence_weight is None
    state, _ = weighted.roll_out(torch.randn(8, 3, 4, 4), nothing_said(8))
    with torch.no_grad():
        for head in weighted.heads.heads:
            head.score[-1].weight.mul_(30)
    gradients = []
    for module in (plain, weighted):
        torch.manual_seed(1)
        x = state.x_s.detach().requires_grad_()
        weight = module._weight(module.divergence_weight, nothing_said(8)) if module.divergence_weight else None
        loss = weighted.matching.student_loss(weighted, TrajectoryState(x, state.s), nothing_said(8), weight)
        gradients += torch.autograd.grad(loss.sum(), x)
    rows = (gradients[1] / gradients[0]).flatten(1)
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows), rtol=1e-3, atol=1e-3)
    assert rows[:, 0].std() > 0.05


def test_training_by_another_divergence_takes_on_the_mean_and_the_spread_of_the_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"nfe": (1,), "critic_lr": 1e-2, "critic_clip": 1.0, "critic_updates": 2, "optimizer": adam(1e-2)}
    gan = CriticGan(hidden=16, divergence="jensen_shannon")
    assert_it_learns_the_data(built(method(gan=gan, **settings)), tmp_path, steps=150)


def test_a_checkpoint_has_critic_and_heads(tmp_path: Path) -> None:
    gan = CriticGan(hidden=16, divergence="jensen_shannon")
    assert_restores(lambda: method(gan=gan, critic_lr=1e-2), {"matching.critic", "heads"}, tmp_path)


def test_the_discriminator_needs_pictures(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Captions, which has no pictures, and DMD2 trains on them"):
        trainer(tmp_path).fit(method(gan=GAN), datamodule=Captions())


def test_the_discriminator_is_refused_where_it_cannot_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = method(gan=GAN)
    monkeypatch.setattr(GaussianAdapter, "supports_sharding", True)
    monkeypatch.setattr(type(module), "sharding", FSDP2Strategy())
    with pytest.raises(ConfigurationError, match=r"which FSDP2Strategy takes apart; set trainer\.strategy to auto or ddp"):
        module.setup("fit")
    assert not hasattr(module, "student")
    monkeypatch.undo()
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
def test_settings_of_the_discriminator_that_cannot_work_are_refused(settings: Any, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        CriticGan(**settings)
