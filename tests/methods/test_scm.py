from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.derivative import value_and_time_derivative
from lightning_distill.flow.path import flow_step, interpolate
from lightning_distill.flow.times import LogitNormal, Uniform
from lightning_distill.flow.trigflow import trig_time
from lightning_distill.methods import SCM
from tests.methods.gaussian_adapter import GAUSSIAN, GaussianAdapter
from tests.methods.test_meanflow import VALIDATION, loader, trainer


def method(student: str = "exact", **settings: Any) -> SCM:
    module = SCM(GaussianAdapter(student), validation=VALIDATION, **({"tangent_warmup_steps": 0} | settings))
    module.setup("fit")
    module.configure_model()
    return module


def objective(module: SCM, monkeypatch: pytest.MonkeyPatch, step: int = 0) -> Any:
    monkeypatch.setattr(SCM, "global_step", step)
    x0 = GAUSSIAN.mean + GAUSSIAN.std * torch.randn(64, 3, 4, 4)
    return module.objective(x0, {"caption": torch.zeros(64)})


def test_an_exact_student_stays(monkeypatch) -> None:
    module = method("exact")
    result = objective(module, monkeypatch)
    result.loss.mean().backward()
    assert result.loss.max() < 1e-6
    assert module.student.bias.grad.abs() < 1e-3


def test_the_gradient_is_that_of_consistency_by_its_change_along_the_trajectory(monkeypatch) -> None:
    """Against `sum f d(f)/dt`, with f and its derivative taken in x_t and t: the direction in u at each state."""
    module = method("small", time_weight=False, tangent_norm="l2", time_sampler=Uniform(0.2, 0.9))
    seen: dict[str, Tensor] = {}

    def average_velocity(x: Tensor, r: Tensor, t: Tensor, condition: Any) -> Tensor:
        u = module.adapter.average_velocity(module.student, x, r, t, condition.prompts)
        if not seen:
            u.retain_grad()
            seen["u"] = u
        return u

    monkeypatch.setattr(module, "average_velocity", average_velocity)
    torch.manual_seed(0)
    result = objective(module, monkeypatch)
    result.loss.sum().backward()
    torch.manual_seed(0)
    x0 = GAUSSIAN.mean + GAUSSIAN.std * torch.randn(64, 3, 4, 4)
    t = Uniform(0.2, 0.9)(64)
    x_t = interpolate(x0, torch.randn_like(x0), t)

    def prediction(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return flow_step(x, module.student(x, r, t, torch.zeros(64)), r, t)

    _, change = value_and_time_derivative(prediction, x_t, torch.zeros_like(t), t, GAUSSIAN.velocity(x_t, t))
    # A step against this gradient moves f = x_t - t u down its own change.
    gradient = seen["u"].grad
    assert gradient is not None
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(1), -change.flatten(1))
    assert cosine.min() > 0.999


def test_tangents_of_one_size_have_losses_of_one_size(monkeypatch) -> None:
    flat = {
        norm: method("small", tangent_norm=norm, time_weight=False, time_sampler=Uniform(0.5, 0.5001)) for norm in ("rms", "l2")
    }
    torch.manual_seed(0)
    rms = objective(flat["rms"], monkeypatch).loss
    torch.manual_seed(0)
    flat["l2"].student.load_state_dict(flat["rms"].student.state_dict())
    l2 = objective(flat["l2"], monkeypatch).loss
    assert rms.max() < 1  # g / (|g| + 0.1), at 1 / tan s = 1
    assert rms.mean() > 20 * l2.mean()  # of 48 entries


def test_learned_weight_finds_the_size_of_the_loss(monkeypatch) -> None:
    module = method("small", time_weight_lr=0.05)
    for _ in range(200):
        with torch.no_grad():
            objective(module, monkeypatch)
    assert objective(module, monkeypatch).loss.mean().item() == pytest.approx(1, abs=0.3)


def test_warm_up_and_its_curve(monkeypatch) -> None:
    module = method("small", tangent_warmup_steps=10)
    assert objective(module, monkeypatch, 5).logs["tangent_weight"] == 0.5
    assert objective(module, monkeypatch, 20).logs["tangent_weight"] == 1


def test_finite_differences_say_the_same(monkeypatch) -> None:
    losses = []
    for derivative in ("exact", "finite_difference"):
        torch.manual_seed(0)
        module = method("small", derivative=derivative)
        module.trainer = trainer(Path())
        losses.append(objective(module, monkeypatch).loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=1e-2)


def test_training_makes_a_student_that_draws_in_one_step_and_two(tmp_path) -> None:
    torch.manual_seed(0)
    module = method("small", optimizer=lambda p: torch.optim.Adam(p, lr=5e-3), time_sampler=LogitNormal(0.2, 1.6))
    noise = torch.randn(256, 3, 4, 4)
    generators = [torch.Generator().manual_seed(i) for i in range(256)]
    condition = {"caption": torch.zeros(256)}

    def errors() -> list[float]:
        x0 = [module.sample_latents(noise, condition, nfe, "student", generators) for nfe in (1, 2)]
        return [abs(x.mean().item() - GAUSSIAN.mean) + abs(x.std().item() - GAUSSIAN.std) for x in x0]

    before = errors()
    trainer(tmp_path, max_steps=600, limit_val_batches=0, log_every_n_steps=100).fit(module, loader())
    after = errors()
    assert max(after) < 0.15
    assert max(after) < 0.3 * min(before)
    exact = GAUSSIAN.flow_map(noise, torch.ones(256), torch.zeros(256))
    drawn = module.sample_latents(noise, condition, 1, "student")
    assert (drawn - exact).square().mean().sqrt() < 0.2


def test_resumes_with_its_weight(tmp_path) -> None:
    run = trainer(tmp_path, max_steps=3, limit_val_batches=0)
    module = method("small")
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = method("small")
    trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(again, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(again.time_weight.linear.bias, module.time_weight.linear.bias)
    assert again.time_weight.linear.bias != 0
    state = again.auxiliary_optimizers(spread=False)["time_weight"].optimizer.state_dict()["state"]
    assert state[0]["step"] == 3


def test_validation_asks_for_jumps_to_0_only(tmp_path) -> None:
    module = method("small")
    assert module.measured_intervals == [(0.0, 1.0), (0.0, 0.5)]
    run = trainer(tmp_path, max_steps=1, val_check_interval=1)
    run.fit(module, loader(), DataLoader(loader().dataset, batch_size=8))
    assert run.callback_metrics["val/average_velocity_error"] > 0


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"tangent_warmup_steps": -1}, "model.tangent_warmup_steps"),
        ({"tangent_norm": "max"}, "model.tangent_norm"),
        ({"time_weight_lr": 0.0}, "model.time_weight_lr"),
        ({"derivative": "none"}, "model.derivative"),
    ],
)
def test_settings_out_of_range_are_refused(settings, names) -> None:
    with pytest.raises(ConfigurationError, match=names):
        method(**settings)


def test_times_of_the_paper() -> None:
    """`s = arctan(e^z)` with a normal z is a logit-normal t."""
    torch.manual_seed(0)
    t = LogitNormal(0.2, 1.6)(4096)
    z = torch.log(torch.tan(trig_time(t)))
    assert z.mean().item() == pytest.approx(0.2, abs=0.1)
    assert z.std().item() == pytest.approx(1.6, abs=0.1)
