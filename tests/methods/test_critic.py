"""The critic of DMD2, TDM and MeanFlow's alignment."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow import LogitNormal, TimeSampler, Uniform
from lightning_distill.flow.path import renoise
from lightning_distill.methods import DMD2, TDM, Guidance
from lightning_distill.methods.critic import EDGE, EVENLY, CriticMethod, DistributionMatching, TrajectoryState
from tests.methods.gaussian_adapter import ExactTeacher, GaussianAdapter
from tests.methods.gaussian_runs import (
    VALIDATION,
    Captions,
    adam,
    assert_learns_moments_of_the_data,
    assert_restores_auxiliary_networks,
    build,
    empty_captions,
    trainer,
    unguided,
)

METHODS = [DMD2, TDM]


def method(kind: type[CriticMethod], student: str = "small", **settings: Any) -> CriticMethod:
    return kind(GaussianAdapter(student), validation=VALIDATION, **settings)


@pytest.mark.parametrize("kind", METHODS)
def test_exact_student_with_exact_critic_has_no_loss(kind: type[CriticMethod]) -> None:
    module = build(method(kind, "exact", nfe=(1, 2, 4)))
    module.matching.critic = ExactTeacher()
    for seed in range(6):  # several steps of several grids
        torch.manual_seed(seed)
        state, _ = module.roll_out(torch.randn(64, 3, 4, 4), unguided(64))
        assert module.matching.student_loss(module.networks, state, unguided(64)).max() < 1e-10


@pytest.mark.parametrize("kind", METHODS)
def test_gradient_darkens_a_student_that_is_too_bright(kind: type[CriticMethod]) -> None:
    module = build(method(kind, "exact", nfe=(1,)))
    module.student.bias.data -= 0.3  # x0 = noise - u is brighter by 0.3; the critic has learned that
    module.matching.critic = ExactTeacher()
    module.matching.critic.offset.fill_(-0.3)
    state, _ = module.roll_out(torch.randn(64, 3, 4, 4), unguided(64))
    module.matching.student_loss(module.networks, state, unguided(64)).mean().backward()
    assert module.student.bias.grad < 0  # a descent step raises the bias


@pytest.mark.parametrize("kind", METHODS)
def test_training_learns_mean_and_standard_deviation_of_the_data(kind: type[CriticMethod], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = build(method(kind, nfe=(1,), critic_lr=1e-2, critic_clip=1.0, critic_updates=2, optimizer=adam(1e-2)))
    assert_learns_moments_of_the_data(module, tmp_path, steps=200)


@pytest.mark.parametrize("kind", METHODS)
def test_checkpoint_restores_the_critic(kind: type[CriticMethod], tmp_path: Path) -> None:
    assert_restores_auxiliary_networks(lambda: method(kind, critic_lr=1e-2), {"matching.critic"}, tmp_path)


@pytest.mark.parametrize("kind", METHODS)
def test_each_critic_update_has_fresh_states(kind: type[CriticMethod], monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(method(kind, nfe=(2,), critic_updates=3))
    states, critic_loss = [], module.matching.critic_loss

    def recorded(networks: Any, state: TrajectoryState, condition: Any) -> Any:
        states.append(state.x_s)
        return critic_loss(networks, state, condition)

    monkeypatch.setattr(module.matching, "critic_loss", recorded)
    objective = module.evaluate_objective(torch.full((8, 3, 4, 4), torch.nan), empty_captions(8))  # reads no images
    assert objective.loss.isfinite().all()
    assert [x.requires_grad for x in states] == [False, False, True]
    assert not torch.equal(states[0], states[1])


@pytest.mark.parametrize("kind", METHODS)
def test_training_needs_prompts_only(kind: type[CriticMethod], tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2)
    run.fit(method(kind), datamodule=Captions())
    assert run.callback_metrics["train/loss"].isfinite()


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"nfe": ()}, "model.nfe"),
        ({"nfe": (0, 2)}, "model.nfe"),
        ({"guidance_scale": -1.0}, "model.guidance_scale"),
        ({"critic_updates": 0}, "model.critic_updates"),
        ({"critic_lr": 0.0}, "model.critic_lr"),
        ({"critic_clip": 0.0}, "model.critic_clip"),
        ({"critic_lora": "teacher"}, "model.critic_lora"),
        ({"guidance": Guidance(kind="improved"), "caption_dropout": 0.1}, "guidance.kind is improved"),
    ],
)
def test_error_for_invalid_settings_names_the_setting(kind: type[CriticMethod], settings: Any, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        method(kind, **settings)


@pytest.mark.parametrize("sampler", [EVENLY, Uniform(0.2, 0.5), LogitNormal(0.0, 30.0)])
def test_noise_levels_are_sampled_between_s_and_the_latest_time(sampler: TimeSampler) -> None:
    matching = DistributionMatching(None, 1, None, "model", sampler)
    s, end = torch.linspace(0, 0.7, 256), torch.linspace(0.2, 1.0, 256)
    x_s = torch.randn(256, 3, requires_grad=True)
    diffused = matching.diffuse(TrajectoryState(x_s, s, end))
    share = (diffused.tau - s) / (end - s)
    low, high = (sampler.low, sampler.high) if isinstance(sampler, Uniform) else (EDGE, 1 - EDGE)
    assert low - 1e-4 < share.min() < low + 0.02
    assert high - 0.02 < share.max() < high + 1e-4
    torch.testing.assert_close(diffused.x_tau, renoise(x_s.detach(), s, diffused.tau, diffused.noise))
    assert not diffused.x_tau.requires_grad
