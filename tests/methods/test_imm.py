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
from lightning_distill.methods.networks import GuidedCondition
from tests.flow.test_moment_matching import NegativeSquaredDistance
from tests.methods.gaussian_adapter import GAUSSIAN, GaussianAdapter
from tests.methods.test_meanflow import VALIDATION, Pictures, loader, trainer


def method(student: str = "exact", **settings: Any) -> IMM:
    module = IMM(GaussianAdapter(student), validation=VALIDATION, **settings)
    module.setup("fit")
    module.configure_model()
    return module


def data(size: int = 64) -> tuple[Tensor, dict[str, Tensor]]:
    return GAUSSIAN.mean + GAUSSIAN.std * torch.randn(size, 3, 4, 4), {"caption": torch.zeros(size)}


def test_an_exact_student_feels_nothing() -> None:
    x0, condition = data(256)
    losses, gradients = [], []
    for bias in (0.0, 0.5):
        # A kernel without a kink where particles coincide, and steps of the teacher that are nearly exact.
        module = method(kernel=RBFKernel(), solver="heun", decrement_exponent=11)
        module.student.bias.data += bias
        torch.manual_seed(0)
        loss = module.objective(x0, condition).loss.mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append(module.student.bias.grad.abs().item())
    assert abs(losses[0]) < 1e-3 * losses[1]
    assert gradients[0] < 1e-3 * gradients[1]


def test_a_batch_that_lacks_a_broken_picture_is_filled_up() -> None:
    x0, condition = data(7)
    assert len(method(particles=4).objective(x0, condition).loss) == 8


def test_one_particle_to_data_under_the_squared_distance_is_consistency_distillation() -> None:
    t = torch.linspace(0.05, 1.0, 16)
    x_t = interpolate(data(16)[0], torch.randn(16, 3, 4, 4), t)
    condition = {"caption": torch.zeros(16)}
    consistency = ConsistencyDistillation(GaussianAdapter("small"), validation=VALIDATION, teacher_step=0.1)
    consistency.setup("fit")
    consistency.configure_model()
    f, target = consistency.consistency(x_t, t, GuidedCondition(condition, condition, torch.ones(16)))
    imm = method(particles=1, kernel=NegativeSquaredDistance(), weight_bias=0.0)
    # With bias 0 the weight is t / (t^2 + (1 - t)^2)^2.
    weight = t / (t**2 + (1 - t) ** 2) ** 2
    parameters = list(consistency.student.parameters())
    squared = 2 * weight * (f - target).square().flatten(1).sum(1)
    theirs = torch.autograd.grad(squared.sum(), parameters, retain_graph=True)
    ours = torch.autograd.grad(imm.compare(f, target, torch.zeros_like(t), t).sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_groups_share_their_times(monkeypatch) -> None:
    module, asked = method("small", particles=4), []
    network = module.average_velocity
    monkeypatch.setattr(module, "average_velocity", lambda x, r, t, c: asked.append((r, t)) or network(x, r, t, c))
    objective = module.objective(*data(64))
    ((s, t),) = asked
    for time in (s, t, objective.loss):
        groups = time.reshape(16, 4)
        assert (groups == groups[:, :1]).all()
        assert len(groups[:, 0].unique()) == 16
    assert (s < t).all()
    assert torch.equal(objective.t, t)


class Noise(TimeSampler):
    """Where sampling starts."""

    def __call__(self, batch: int, device: Any = None, generator: Any = None) -> Tensor:
        return torch.ones(batch, device=device)


@pytest.mark.parametrize("bridge", ["teacher", "data"])
def test_time_1_is_trained(bridge) -> None:
    module = method("small", time_sampler=Noise(), bridge=bridge)
    loss = module.objective(*data()).loss.sum()
    loss.backward()
    assert loss > 0
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in module.student.parameters())


def test_the_bridge_of_the_data_keeps_the_noise_and_asks_no_teacher(monkeypatch) -> None:
    module, seen = method("small", bridge="data", decrement_exponent=6), []
    monkeypatch.setattr(module, "integrate_teacher", None)
    own, others = module.average_velocity, module.student_step
    monkeypatch.setattr(module, "average_velocity", lambda x, r, t, c: seen.append((x, t)) or own(x, r, t, c))
    monkeypatch.setattr(module, "student_step", lambda x, r, t, c: seen.append((x, t)) or others(x, r, t, c))
    x0, condition = data()
    module.objective(x0, condition)
    (x_t, t), (x_r, r) = seen[:2]
    noise = (x_t - (1 - t[:, None, None, None]) * x0) / t[:, None, None, None]
    torch.testing.assert_close(x_r, interpolate(x0, noise, r), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bridge", ["teacher", "data"])
def test_training_reduces_the_error(bridge, tmp_path) -> None:
    module = method("small", bridge=bridge, decrement_exponent=7, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    (before,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    trainer(tmp_path, max_steps=160, max_epochs=-1, limit_val_batches=0).fit(module, loader())
    (after,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    assert after["val/average_velocity_error"] < 0.5 * before["val/average_velocity_error"]


class BatchesOf(LightningDataModule):
    """Pictures, so many at a time."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(Pictures(), batch_size=self.batch_size)


def test_a_batch_that_is_no_whole_number_of_groups_is_refused_before_anything_loads(tmp_path) -> None:
    module = IMM(GaussianAdapter("small"), validation=VALIDATION, particles=4)
    with pytest.raises(ConfigurationError, match=r"a batch is 6 samples, .* model\.particles 4; set data\.batch_size"):
        trainer(tmp_path).fit(module, datamodule=BatchesOf(6))
    assert not hasattr(module, "student")
    trainer(tmp_path, max_steps=1).fit(module, datamodule=BatchesOf(8))


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
        ({"guidance": Guidance("improved"), "caption_dropout": 0.1}, r"guidance\.kind improved .* IMM"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, names) -> None:
    with pytest.raises(ConfigurationError, match=names):
        IMM(GaussianAdapter(), validation=VALIDATION, **settings)
