from pathlib import Path

import pytest
import torch
from lightning import Trainer
from torch import nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import conditional_velocity, interpolate
from lightning_distill.flow.times import Uniform
from lightning_distill.methods.base import Objective
from lightning_distill.methods.flow_matching import FlowMatching
from lightning_distill.methods.guidance import Guidance
from lightning_distill.teachers.student_options import StudentOptions
from tests.methods.gaussian_adapter import GAUSSIAN, GaussianAdapter, SmallNetwork
from tests.methods.test_meanflow import VALIDATION, loader, trainer


def method(teacher: str = "small", **settings) -> FlowMatching:
    module = FlowMatching(GaussianAdapter(teacher=teacher), validation=VALIDATION, **settings)
    module.setup("fit")
    module.configure_model()
    return module


def test_loss_is_the_squared_error_of_the_conditional_velocity() -> None:
    module = method(time_sampler=Uniform(0.3, 0.9))
    x0, condition = torch.randn(8, 3, 4, 4), {"caption": torch.zeros(8)}
    torch.manual_seed(3)
    objective = module.objective(x0, condition)
    torch.manual_seed(3)
    t, noise = Uniform(0.3, 0.9)(8, x0.device), torch.randn_like(x0)
    v = module.student(interpolate(x0, noise, t), None, t, condition["caption"])
    torch.testing.assert_close(objective.loss, (v - conditional_velocity(x0, noise)).square().flatten(1).mean(1))
    assert torch.equal(objective.t, t)


def test_the_marginal_velocity_minimises_the_loss() -> None:
    """The regression's minimum is the closed-form velocity: moving it either way raises the loss by the square."""
    module = method("exact", time_sampler=Uniform(0.1, 0.9))
    x0 = GAUSSIAN.mean + GAUSSIAN.std * torch.randn(4096, 3, 4, 4)
    losses = []
    for offset in (-0.1, 0.0, 0.1):
        torch.manual_seed(0)
        module.student.offset.fill_(offset)
        losses.append(module.objective(x0, {"caption": torch.zeros(4096)}).loss.mean().item())
    assert losses[0] - losses[1] == pytest.approx(0.01, abs=2e-3)
    assert losses[2] - losses[1] == pytest.approx(0.01, abs=2e-3)


def test_training_lowers_the_loss_and_saves_the_network_once(tmp_path: Path) -> None:
    module = method(optimizer=lambda p: torch.optim.Adam(p, lr=0.01), ema_decay=0.9)
    run = trainer(tmp_path, max_steps=40, limit_val_batches=0)
    x0, condition = next(iter(loader()))["image"], {"caption": torch.zeros(8)}

    def loss() -> float:
        torch.manual_seed(1)
        return module.objective(x0, condition).loss.mean().item()

    before = loss()
    run.fit(module, loader())
    assert loss() < 0.8 * before
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in saved} == {"networks", "ema"}


def test_dropped_captions_are_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = method(caption_dropout=0.5)
    seen: list[str] = []
    encode = module.adapter.encode_prompt
    monkeypatch.setattr(module.adapter, "encode_prompt", lambda prompts: seen.extend(prompts) or encode(prompts))
    module.trainer = trainer(tmp_path)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "log_dict", lambda *args, **kwargs: None)
    batch = {"prompt": ["a red circle"] * 400, "image": torch.randn(400, 3, 4, 4), "index": torch.arange(400)}
    module.training_step(batch, 0)
    assert set(seen) == {"", "a red circle"}
    assert 150 < seen.count("") < 250


def test_dropped_captions_of_encoded_data_are_the_same_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = method(caption_dropout=0.5)
    seen: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(
        module, "objective", lambda x0, condition: seen.append(condition) or Objective(x0.new_ones(400), x0[:, 0, 0, 0])
    )
    module.trainer = trainer(tmp_path)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "log_dict", lambda *args, **kwargs: None)
    batch = {"prompt": ["a red circle"] * 400, "index": torch.arange(400)}
    encoded = {"latents": torch.rand(400, 3, 4, 4), "condition": module.adapter.encode_prompt(batch["prompt"])}
    for further in ({"image": encoded["latents"]}, encoded):
        torch.manual_seed(2)
        module.training_step({**batch, **further}, 0)
    assert torch.equal(seen[0]["caption"], seen[1]["caption"])
    assert 150 < (seen[1]["caption"] == 0).sum() < 250
    assert not (encoded["condition"]["caption"] == 0).any()


@pytest.mark.parametrize("guidance", [Guidance("improved"), Guidance("embedded", scale=4.0, scales=[4.0, 5.0])])
def test_guidance_that_only_students_learn_is_refused(guidance: Guidance) -> None:
    with pytest.raises(ConfigurationError, match=r"guidance\.(kind improved|scales) .*FlowMatching"):
        method(guidance=guidance)


def test_a_checkpoint_whose_text_encoders_trained_is_refused_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(trained: bool, resumed: Path | None) -> Trainer:
        adapter = GaussianAdapter(teacher="small")
        monkeypatch.setattr(adapter, "text_encoders", lambda: {"text_encoder": nn.Linear(1, 1)})
        module = FlowMatching(adapter, validation=VALIDATION, train_text_encoders=trained)
        fitted = trainer(tmp_path, max_steps=1, limit_val_batches=0)
        fitted.fit(module, loader(), ckpt_path=resumed)
        return fitted

    run(True, None).save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ConfigurationError, match=r"networks\.text_encoder"):
        run(False, tmp_path / "last.ckpt")


def test_text_encoders_train_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for trained in (False, True):
        adapter = GaussianAdapter(teacher="small")
        encoder = nn.Linear(1, 1).requires_grad_(False)
        monkeypatch.setattr(adapter, "text_encoders", lambda encoder=encoder: {"text_encoder": encoder})
        module = FlowMatching(adapter, validation=VALIDATION, train_text_encoders=trained)
        module.configure_model()
        parameters = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
        assert (id(encoder.weight) in parameters) is trained
        assert encoder.weight.requires_grad is trained


def test_samples_under_guidance() -> None:
    noise, condition = torch.randn(4, 3, 4, 4), {"caption": torch.full((4,), 0.5)}
    plain = method("exact").sample_latents(noise, condition, 2, "student")
    guided = method("exact", guidance=Guidance(scale=3.0)).sample_latents(noise, condition, 2, "student")
    # A caption adds its worth to the velocity, guidance multiplies that by its scale; both through two Euler steps.
    assert (plain - guided).mean() > 0.5


def test_caption_dropout_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"model\.caption_dropout"):
        method(caption_dropout=1.0)


def test_an_average_of_half_of_what_trains_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"model\.ema_decay"):
        method(train_text_encoders=True, ema_decay=0.9)


def test_blocks_are_run_again_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(SmallNetwork, "enable_gradient_checkpointing", lambda network: asked.append(network), raising=False)
    method()
    assert asked == []
    module = method(student=StudentOptions(gradient_checkpointing=True))
    assert asked == [module.student]


def test_policies_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"student\.policy_points is 4"):
        method(student=StudentOptions(policy_points=4))
