from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.derivative import value_and_time_derivative
from lightning_distill.flow.path import flow_step, interpolate
from lightning_distill.flow.times import LogitNormal, Uniform
from lightning_distill.flow.trigflow import trig_time
from lightning_distill.methods import SCM, Objective
from tests.methods.gaussian_adapter import GAUSSIAN, GaussianAdapter
from tests.methods.gaussian_runs import VALIDATION, build, data_samples, empty_captions, loader, trainer


def method(student: str = "exact", **settings: Any) -> Any:
    settings = {"tangent_warmup_steps": 0} | settings
    return build(SCM(GaussianAdapter(student), validation=VALIDATION, **settings))


def evaluate(module: SCM) -> Objective:
    """The objective of a batch, after a step of the time weight."""
    return module.evaluate_objective(data_samples(64), empty_captions(64))


def test_exact_student_has_no_loss_and_no_gradient() -> None:
    module = method("exact")
    objective = evaluate(module)
    objective.loss.mean().backward()
    assert objective.loss.max() < 1e-6
    assert module.student.bias.grad.abs() < 1e-3


def test_gradient_is_the_derivative_of_the_predicted_x0_along_the_trajectory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient in u at each state, against `f df/dt` with f = x_t - t u and its derivative in x_t and t."""
    module = method("small", time_weight=False, tangent_norm="l2", time_sampler=Uniform(0.2, 0.9))
    outputs: dict[str, Tensor] = {}

    def average_velocity(x: Tensor, r: Tensor, t: Tensor, condition: Any) -> Tensor:
        u = module.adapter.average_velocity(module.student, x, r, t, condition.prompts)
        if not outputs:
            u.retain_grad()
            outputs["u"] = u
        return u

    monkeypatch.setattr(module.networks, "average_velocity", average_velocity)
    torch.manual_seed(0)
    evaluate(module).loss.sum().backward()
    torch.manual_seed(0)
    x0 = data_samples(64)
    t = Uniform(0.2, 0.9)(64)
    x_t = interpolate(x0, torch.randn_like(x0), t)

    def prediction(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return flow_step(x, module.student(x, r, t, torch.zeros(64)), r, t)

    _, change = value_and_time_derivative(prediction, x_t, torch.zeros_like(t), t, GAUSSIAN.velocity(x_t, t))
    # A descent step moves f = x_t - t u against its derivative.
    gradient = outputs["u"].grad
    assert gradient is not None
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(1), -change.flatten(1))
    assert cosine.min() > 0.999


def test_rms_norm_of_the_tangent_gives_losses_below_1() -> None:
    rms, l2 = (
        method("small", tangent_norm=norm, time_weight=False, time_sampler=Uniform(0.5, 0.5001)) for norm in ("rms", "l2")
    )
    torch.manual_seed(0)
    rms_loss = evaluate(rms).loss
    torch.manual_seed(0)
    l2.student.load_state_dict(rms.student.state_dict())
    l2_loss = evaluate(l2).loss
    assert rms_loss.max() < 1  # g / (|g| + 0.1), at 1 / tan s = 1
    assert rms_loss.mean() > 20 * l2_loss.mean()  # latents have 48 entries


def test_learned_time_weight_scales_the_loss_to_1() -> None:
    module = method("small", time_weight_lr=0.05)
    for _ in range(200):
        evaluate(module)  # steps the time weight only
    assert evaluate(module).loss.mean().item() == pytest.approx(1, abs=0.3)


def test_tangent_weight_rises_during_the_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    module = method("small", tangent_warmup_steps=10)
    for step, weight in ((5, 0.5), (20, 1)):
        monkeypatch.setattr(SCM, "global_step", step)
        assert evaluate(module).logs["tangent_weight"] == weight


def test_loss_of_finite_differences_is_close_to_the_exact_one() -> None:
    losses = []
    for derivative in ("exact", "finite_difference"):
        torch.manual_seed(0)
        losses.append(evaluate(method("small", derivative=derivative)).loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=1e-2)


def test_trained_student_samples_the_data_in_one_step_and_two(tmp_path: Any) -> None:
    torch.manual_seed(0)
    module = method("small", optimizer=lambda p: torch.optim.Adam(p, lr=5e-3), time_sampler=LogitNormal(0.2, 1.6))
    noise = torch.randn(256, 3, 4, 4)
    generators = [torch.Generator().manual_seed(i) for i in range(256)]

    def sample(nfe: int) -> Tensor:
        return module.evaluator.sample_latents(noise, empty_captions(256), nfe, "student", generators)

    def errors() -> list[float]:
        return [abs(x.mean().item() - GAUSSIAN.mean) + abs(x.std().item() - GAUSSIAN.std) for x in (sample(1), sample(2))]

    before = errors()
    trainer(tmp_path, max_steps=600, limit_val_batches=0, log_every_n_steps=100).fit(module, loader())
    after = errors()
    assert max(after) < 0.15
    assert max(after) < 0.3 * min(before)
    exact = GAUSSIAN.flow_map(noise, torch.ones(256), torch.zeros(256))
    assert (sample(1) - exact).square().mean().sqrt() < 0.2


def test_checkpoint_restores_the_time_weight(tmp_path: Any) -> None:
    run = trainer(tmp_path, max_steps=3, limit_val_batches=0)
    module = method("small")
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    resumed = method("small")
    trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(resumed.time_weight.linear.bias, module.time_weight.linear.bias)
    assert resumed.time_weight.linear.bias != 0
    state = resumed.auxiliary_optimizers()["time_weight"].optimizer.state_dict()["state"]
    assert state[0]["step"] == 3


def test_validation_measures_intervals_with_r_0_only(tmp_path: Any) -> None:
    module = method("small")
    assert module.evaluator.measured_intervals == [(0.0, 1.0), (0.0, 0.5)]
    run = trainer(tmp_path, max_steps=1, val_check_interval=1)
    run.fit(module, loader(), loader())
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
def test_error_for_invalid_settings_names_the_setting(settings: Any, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        method(**settings)


def test_logit_normal_t_is_a_normal_logarithm_of_tan_s() -> None:
    """`s = arctan(e^z)` with a normal z is a logit-normal t."""
    torch.manual_seed(0)
    t = LogitNormal(0.2, 1.6)(4096)
    z = torch.log(torch.tan(trig_time(t)))
    assert z.mean().item() == pytest.approx(0.2, abs=0.1)
    assert z.std().item() == pytest.approx(1.6, abs=0.1)
