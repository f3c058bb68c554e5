"""What alignment, DMD2 and TDM share."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow import LogitNormal, TimeSampler, Uniform
from lightning_distill.flow.path import renoise
from lightning_distill.methods import DMD2, TDM, Guidance, MeanFlow, TrajectoryAlignment
from lightning_distill.methods.critic import EDGE, EVENLY, CriticMethod, DistributionMatching, TrajectoryState
from tests.methods.gaussian_adapter import ExactTeacher, GaussianAdapter
from tests.methods.gaussian_runs import adam, assert_it_learns_the_data, assert_restores, built, nothing_said
from tests.methods.test_meanflow import VALIDATION, Captions, loader, trainer

METHODS = [DMD2, TDM]


def method(kind: type[CriticMethod], student: str = "small", **settings: Any) -> CriticMethod:
    return kind(GaussianAdapter(student), validation=VALIDATION, **settings)


class Losses(Callback):
    """Of every step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.found += [trainer.callback_metrics[f"train/{name}"].item() for name in ("loss", "critic_loss", "alignment_loss")]


def test_alignment_has_the_losses_that_it_had_on_its_own(tmp_path: Path) -> None:
    """Recorded before it shared its critic with other methods."""
    torch.manual_seed(0)
    alignment = TrajectoryAlignment(critic_lr=1e-2, critic_updates=2, guidance_scale=2.0)
    adapter = GaussianAdapter("small", teacher="small")
    module = built(MeanFlow(adapter, validation=VALIDATION, alignment=alignment, optimizer=lambda p: torch.optim.Adam(p, 1e-2)))
    losses = Losses()
    trainer(tmp_path, limit_val_batches=0, callbacks=[losses]).fit(module, loader())
    recorded = [
        *(0.14178156852722168, 2.094195604324341, 0.03219472989439964),
        *(0.08190268278121948, 1.8888111114501953, 0.030616816133260727),
        *(0.12913398444652557, 1.5082252025604248, 0.09721505641937256),
        *(0.04836006835103035, 2.0085577964782715, 0.027591945603489876),
    ]
    assert losses.found == pytest.approx(recorded, rel=1e-5)


@pytest.mark.parametrize("kind", METHODS)
def test_an_exact_student_feels_nothing(kind: type[CriticMethod]) -> None:
    """Where its samples have the teacher's distribution, and the critic knows it: for every step of every grid."""
    module = built(method(kind, "exact", nfe=(1, 2, 4)))
    module.matching.critic = ExactTeacher()
    for seed in range(6):
        torch.manual_seed(seed)
        state, _ = module.roll_out(torch.randn(64, 3, 4, 4), nothing_said(64))
        assert module.matching.student_loss(module, state, nothing_said(64)).max() < 1e-10


@pytest.mark.parametrize("kind", METHODS)
def test_a_student_that_is_too_bright_is_pulled_back(kind: type[CriticMethod]) -> None:
    module = built(method(kind, "exact", nfe=(1,)))
    module.student.bias.data -= 0.3  # x0 = noise - u is brighter by 0.3, and the critic has seen it
    module.matching.critic = ExactTeacher()
    module.matching.critic.offset.fill_(-0.3)
    state, _ = module.roll_out(torch.randn(64, 3, 4, 4), nothing_said(64))
    module.matching.student_loss(module, state, nothing_said(64)).mean().backward()
    assert module.student.bias.grad < 0  # a descent step raises the bias


@pytest.mark.parametrize("kind", METHODS)
def test_training_takes_on_the_mean_and_the_spread_of_the_data(kind: type[CriticMethod], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = built(method(kind, nfe=(1,), critic_lr=1e-2, critic_clip=1.0, critic_updates=2, optimizer=adam(1e-2)))
    assert_it_learns_the_data(module, tmp_path, steps=200)


@pytest.mark.parametrize("kind", METHODS)
def test_a_checkpoint_has_the_critic(kind: type[CriticMethod], tmp_path: Path) -> None:
    assert_restores(lambda: method(kind, critic_lr=1e-2), {"matching.critic"}, tmp_path)


@pytest.mark.parametrize("kind", METHODS)
def test_each_update_of_the_critic_is_on_fresh_states(kind: type[CriticMethod], monkeypatch: pytest.MonkeyPatch) -> None:
    module = built(method(kind, nfe=(2,), critic_updates=3))
    seen = []
    monkeypatch.setattr(module.matching, "update_critic", lambda _, state, *rest: seen.append(state.x_s) or torch.zeros(()))
    objective = module.objective(torch.full((8, 3, 4, 4), torch.nan), {"caption": torch.zeros(8)})  # no pictures are looked at
    assert objective.loss.isfinite().all()
    assert [x.requires_grad for x in seen] == [False, False, True]
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("kind", METHODS)
def test_prompts_alone_will_do(kind: type[CriticMethod], tmp_path: Path) -> None:
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
        ({"guidance": Guidance(kind="improved"), "caption_dropout": 0.1}, "guidance.kind improved"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(kind: type[CriticMethod], settings: Any, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        method(kind, **settings)


@pytest.mark.parametrize("sampler", [EVENLY, Uniform(0.2, 0.5), LogitNormal(0.0, 30.0)])
def test_states_are_compared_at_the_times_that_are_asked_for_between_theirs_and_their_end(sampler: TimeSampler) -> None:
    matching = DistributionMatching(None, 1, 1e-3, 1.0, None, "model", sampler)
    s, end = torch.linspace(0, 0.7, 256), torch.linspace(0.2, 1.0, 256)
    x_s = torch.randn(256, 3, requires_grad=True)
    diffused = matching.diffuse(TrajectoryState(x_s, s, end))
    share = (diffused.tau - s) / (end - s)
    low, high = (sampler.low, sampler.high) if isinstance(sampler, Uniform) else (EDGE, 1 - EDGE)
    assert low - 1e-4 < share.min() < low + 0.02
    assert high - 0.02 < share.max() < high + 1e-4
    torch.testing.assert_close(diffused.x_tau, renoise(x_s.detach(), s, diffused.tau, diffused.noise))
    assert not diffused.x_tau.requires_grad
