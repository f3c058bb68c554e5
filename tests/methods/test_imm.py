from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.moment_matching import RBFKernel
from lightning_distill.flow.path import interpolate
from lightning_distill.flow.times import TimeSampler
from lightning_distill.methods import IMM, ConsistencyDistillation, Guidance
from tests.flow.test_moment_matching import NegativeSquaredDistance
from tests.methods.gaussian_adapter import GaussianAdapter
from tests.methods.gaussian_runs import (
    VALIDATION,
    GaussianImages,
    build,
    data_samples,
    empty_captions,
    loader,
    path_states,
    trainer,
    unguided,
)


def method(student: str = "exact", **settings: Any) -> Any:
    return build(IMM(GaussianAdapter(student), validation=VALIDATION, **settings))


def test_exact_student_has_almost_no_loss_and_no_gradient() -> None:
    x0, losses, gradients = data_samples(256), [], []
    for bias in (0.0, 0.5):
        # The kernel is smooth where particles coincide, and the steps of the teacher are nearly exact.
        module = method(kernel=RBFKernel(), solver="heun", decrement_exponent=11)
        module.student.bias.data += bias
        torch.manual_seed(0)
        loss = module.objective(x0, empty_captions(256)).loss.mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append(module.student.bias.grad.abs().item())
    assert abs(losses[0]) < 1e-3 * losses[1]
    assert gradients[0] < 1e-3 * gradients[1]


def test_incomplete_group_is_filled_with_repeated_samples() -> None:
    assert len(method(particles=4).objective(data_samples(7), empty_captions(7)).loss) == 8


def test_gradient_of_one_particle_with_squared_distance_is_that_of_consistency_distillation() -> None:
    x_t, t = path_states(0.05)
    consistency = build(ConsistencyDistillation(GaussianAdapter("small"), validation=VALIDATION, teacher_step=0.1))
    f, target = consistency.consistency(x_t, t, unguided(16))
    imm = method(particles=1, kernel=NegativeSquaredDistance(), weight_bias=0.0)
    # With bias 0 the weight is t / (t^2 + (1 - t)^2)^2.
    weight = t / (t**2 + (1 - t) ** 2) ** 2
    parameters = list(consistency.student.parameters())
    squared = 2 * weight * (f - target).square().flatten(1).sum(1)
    expected = torch.autograd.grad(squared.sum(), parameters, retain_graph=True)
    gradients = torch.autograd.grad(imm.compare(f, target, torch.zeros_like(t), t).sum(), parameters)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_samples_of_a_group_share_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    module, times = method("small", particles=4), []
    u = module.networks.average_velocity
    monkeypatch.setattr(module.networks, "average_velocity", lambda x, r, t, c: times.append((r, t)) or u(x, r, t, c))
    objective = module.objective(data_samples(64), empty_captions(64))
    ((s, t),) = times
    for values in (s, t, objective.loss):
        groups = values.reshape(16, 4)
        assert (groups == groups[:, :1]).all()
        assert len(groups[:, 0].unique()) == 16
    assert (s < t).all()
    assert torch.equal(objective.t, t)


class TimeOne(TimeSampler):
    """The time at which sampling starts."""

    def __call__(self, batch: int, device: Any = None, generator: Any = None) -> Tensor:
        return torch.ones(batch, device=device)


@pytest.mark.parametrize("bridge", ["teacher", "data"])
def test_time_1_trains(bridge: str) -> None:
    module = method("small", time_sampler=TimeOne(), bridge=bridge)
    loss = module.objective(data_samples(64), empty_captions(64)).loss.sum()
    loss.backward()
    assert loss > 0
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in module.student.parameters())


def test_data_bridge_has_the_same_noise_and_no_teacher_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    module, states = method("small", bridge="data", decrement_exponent=6), []
    monkeypatch.setattr(module.networks, "integrate_teacher", None)
    u, step = module.networks.average_velocity, module.networks.student_step
    monkeypatch.setattr(module.networks, "average_velocity", lambda x, r, t, c: states.append((x, t)) or u(x, r, t, c))
    monkeypatch.setattr(module.networks, "student_step", lambda x, r, t, c: states.append((x, t)) or step(x, r, t, c))
    x0 = data_samples(64)
    module.objective(x0, empty_captions(64))
    (x_t, t), (x_r, r) = states[:2]
    noise = (x_t - (1 - t[:, None, None, None]) * x0) / t[:, None, None, None]
    torch.testing.assert_close(x_r, interpolate(x0, noise, r), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bridge", ["teacher", "data"])
def test_training_halves_the_average_velocity_error(bridge: str, tmp_path: Any) -> None:
    module = method("small", bridge=bridge, decrement_exponent=7, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    (before,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    trainer(tmp_path, max_steps=160, max_epochs=-1, limit_val_batches=0).fit(module, loader())
    (after,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    assert after["val/average_velocity_error"] < 0.5 * before["val/average_velocity_error"]


class ImagesModule(LightningDataModule):
    """Gaussian images in batches of a given size."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(GaussianImages(), batch_size=self.batch_size)


def test_batch_size_that_does_not_divide_into_groups_is_an_error_before_loading(tmp_path: Any) -> None:
    module = IMM(GaussianAdapter("small"), validation=VALIDATION, particles=4)
    with pytest.raises(ConfigurationError, match=r"data\.batch_size is 6, .* model\.particles 4; choose a multiple"):
        trainer(tmp_path).fit(module, datamodule=ImagesModule(6))
    assert not module.networks.built
    trainer(tmp_path, max_steps=1).fit(module, datamodule=ImagesModule(8))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"particles": 0}, r"model\.particles"),
        ({"bridge": "student"}, r"model\.bridge"),
        ({"bridge": "data", "guidance": Guidance(scale=2.0)}, r"model\.bridge is data, .*scale is 2\.0"),
        ({"solver": "rk4"}, r"model\.solver"),
        ({"decrement_exponent": 0}, r"model\.decrement_exponent"),
        ({"decrement_exponent": 17}, r"model\.decrement_exponent"),
        ({"eta_max": 0.0}, r"model\.eta_max"),
        ({"weight_power": 0.5}, r"model\.weight_power"),
        ({"guidance": Guidance("improved"), "caption_dropout": 0.1}, r"guidance\.kind is improved.* IMM"),
    ],
)
def test_error_for_invalid_settings_names_the_setting(settings: Any, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        IMM(GaussianAdapter(), validation=VALIDATION, **settings)
