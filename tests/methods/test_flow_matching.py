from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import conditional_velocity, interpolate
from lightning_distill.flow.times import Uniform
from lightning_distill.methods import FlowMatching, Guidance, Objective
from lightning_distill.teachers.student_options import StudentOptions
from tests.methods.gaussian_adapter import GaussianAdapter, SmallNetwork
from tests.methods.gaussian_runs import VALIDATION, build, data_samples, empty_captions, loader, trainer


def method(teacher: str = "small", **settings: Any) -> Any:
    return build(FlowMatching(GaussianAdapter(teacher=teacher), validation=VALIDATION, **settings))


def text_encoder_method(monkeypatch: pytest.MonkeyPatch, trained: bool) -> tuple[FlowMatching, nn.Linear]:
    """The method with an adapter that has a text encoder."""
    adapter = GaussianAdapter(teacher="small")
    adapter.text_encoder = nn.Linear(1, 1).requires_grad_(False)
    monkeypatch.setattr(adapter, "text_encoders", lambda: {"text_encoder": adapter.text_encoder})
    return FlowMatching(adapter, validation=VALIDATION, train_text_encoders=trained), adapter.text_encoder


def test_loss_is_the_squared_error_of_the_conditional_velocity() -> None:
    module = method(time_sampler=Uniform(0.3, 0.9))
    x0, condition = torch.randn(8, 3, 4, 4), empty_captions(8)
    torch.manual_seed(3)
    objective = module.objective(x0, condition)
    torch.manual_seed(3)
    t, noise = Uniform(0.3, 0.9)(8, x0.device), torch.randn_like(x0)
    v = module.student(interpolate(x0, noise, t), None, t, condition["caption"])
    torch.testing.assert_close(objective.loss, (v - conditional_velocity(x0, noise)).square().flatten(1).mean(1))
    assert torch.equal(objective.t, t)


def test_marginal_velocity_minimises_the_loss() -> None:
    """An offset from the closed-form velocity raises the loss by its square."""
    module = method("exact", time_sampler=Uniform(0.1, 0.9))
    x0 = data_samples(4096)
    losses = []
    for offset in (-0.1, 0.0, 0.1):
        torch.manual_seed(0)
        module.student.offset.fill_(offset)
        losses.append(module.objective(x0, empty_captions(4096)).loss.mean().item())
    assert losses[0] - losses[1] == pytest.approx(0.01, abs=2e-3)
    assert losses[2] - losses[1] == pytest.approx(0.01, abs=2e-3)


def test_training_lowers_the_loss_and_checkpoints_hold_network_and_ema(tmp_path: Path) -> None:
    module = method(optimizer=lambda p: torch.optim.Adam(p, lr=0.01), ema_decay=0.9)
    run = trainer(tmp_path, max_steps=40, limit_val_batches=0)
    x0 = next(iter(loader()))["image"]

    def loss() -> float:
        torch.manual_seed(1)
        return module.objective(x0, empty_captions(8)).loss.mean().item()

    before = loss()
    run.fit(module, loader())
    assert loss() < 0.8 * before
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {".".join(name.split(".")[:2]) for name in saved} == {"networks.student", "networks.ema"}


def test_caption_dropout_replaces_captions_by_the_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = method(caption_dropout=0.5)
    encoded: list[str] = []
    encode = module.adapter.encode_prompt
    monkeypatch.setattr(module.adapter, "encode_prompt", lambda prompts: encoded.extend(prompts) or encode(prompts))
    module.trainer = trainer(tmp_path)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "log_dict", lambda *args, **kwargs: None)
    batch = {"prompt": ["a red circle"] * 400, "image": torch.randn(400, 3, 4, 4), "index": torch.arange(400)}
    module.training_step(batch, 0)
    assert set(encoded) == {"", "a red circle"}
    assert 150 < encoded.count("") < 250


def test_caption_dropout_is_the_same_for_encoded_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = method(caption_dropout=0.5)
    conditions: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(
        module, "objective", lambda x0, condition: conditions.append(condition) or Objective(x0.new_ones(400), x0[:, 0, 0, 0])
    )
    module.trainer = trainer(tmp_path)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "log_dict", lambda *args, **kwargs: None)
    batch = {"prompt": ["a red circle"] * 400, "index": torch.arange(400)}
    encoded = {"latents": torch.rand(400, 3, 4, 4), "condition": module.adapter.encode_prompt(batch["prompt"])}
    for inputs in ({"image": encoded["latents"]}, encoded):
        torch.manual_seed(2)
        module.training_step({**batch, **inputs}, 0)
    assert torch.equal(conditions[0]["caption"], conditions[1]["caption"])
    assert 150 < (conditions[1]["caption"] == 0).sum() < 250
    assert not (encoded["condition"]["caption"] == 0).any()


@pytest.mark.parametrize("guidance", [Guidance("improved"), Guidance("embedded", scale=4.0, scales=[4.0, 5.0])])
def test_guidance_for_distillation_only_is_an_error(guidance: Guidance) -> None:
    with pytest.raises(ConfigurationError, match=r"guidance\.(kind improved|scales) .*FlowMatching"):
        method(guidance=guidance)


def test_resuming_trained_text_encoders_without_training_them_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(trained: bool, resumed: Path | None) -> Trainer:
        module, _ = text_encoder_method(monkeypatch, trained)
        fitted = trainer(tmp_path, max_steps=1, limit_val_batches=0)
        fitted.fit(module, loader(), ckpt_path=resumed)
        return fitted

    run(True, None).save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ConfigurationError, match=r"has the weight 'networks\.adapter\.text_encoder"):
        run(False, tmp_path / "last.ckpt")


@pytest.mark.parametrize("trained", [False, True])
def test_text_encoders_train_only_with_train_text_encoders(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, encoder = text_encoder_method(monkeypatch, trained)
    module.configure_model()
    parameters = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert (id(encoder.weight) in parameters) is trained
    assert encoder.weight.requires_grad is trained
    assert any(name.startswith("networks.adapter.text_encoder.") for name in module.saved_names()) is trained


def test_guidance_changes_samples() -> None:
    noise, condition = torch.randn(4, 3, 4, 4), {"caption": torch.full((4,), 0.5)}
    plain = method("exact").evaluator.sample_latents(noise, condition, 2, "student")
    guided = method("exact", guidance=Guidance(scale=3.0)).evaluator.sample_latents(noise, condition, 2, "student")
    # A caption adds its value to the velocity, and guidance multiplies that by its scale, in both Euler steps.
    assert (plain - guided).mean() > 0.5


def test_caption_dropout_of_1_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"model\.caption_dropout"):
        method(caption_dropout=1.0)


def test_ema_with_trained_text_encoders_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"model\.ema_decay"):
        method(train_text_encoders=True, ema_decay=0.9)


def test_gradient_checkpointing_is_enabled_only_if_set(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = []
    monkeypatch.setattr(SmallNetwork, "enable_gradient_checkpointing", lambda network: networks.append(network), raising=False)
    method()
    assert networks == []
    module = method(student=StudentOptions(gradient_checkpointing=True))
    assert networks == [module.student]


def test_policy_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"student\.policy_points is 4"):
        method(student=StudentOptions(policy_points=4))
