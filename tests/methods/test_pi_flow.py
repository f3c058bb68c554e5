from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import expand, interpolate
from lightning_distill.methods import PiFlow
from lightning_distill.methods.pi_flow import mixture
from lightning_distill.students.policy import flow_step_weights, velocity_weights
from lightning_distill.teachers.model_adapter import Condition
from lightning_distill.teachers.student_options import StudentOptions
from tests.methods.gaussian_adapter import GAUSSIAN, GaussianAdapter
from tests.methods.gaussian_runs import VALIDATION, build, data_samples, empty_captions, loader, trainer, unguided

POINTS = 65


class ExactPolicy(nn.Module):
    """The policy of the teacher's trajectory plus a trainable constant, which starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        outputs = []
        for share in torch.linspace(0, 1, POINTS):
            tau = r + share * (t - r)
            x_tau = GAUSSIAN.flow_map(x, t, tau)
            x0 = x_tau - expand(tau, x) * GAUSSIAN.velocity(x_tau, tau)
            outputs.append((x - x0) / expand(t, x))
        return torch.stack(outputs, 1) + self.bias


class PolicyAdapter(GaussianAdapter):
    """Builds students with the exact policy."""

    def check_student(self, options: StudentOptions) -> None: ...

    def build_student(self, teacher: nn.Module, options: StudentOptions) -> tuple[nn.Module, None]:
        return ExactPolicy(), None

    def policy(  # type: ignore[override]
        self, student: nn.Module, x_t: Tensor, r: Tensor, t: Tensor, condition: Condition, guidance_scale: Any = None
    ) -> Tensor:
        return student(x_t, r, t)

    def average_velocity(self, student, x_t, r, t, condition, guidance_scale=None) -> Tensor:  # type: ignore[no-untyped-def]
        return mixture(student(x_t, r, t), flow_step_weights(r, t, POINTS))


def method(**settings: Any) -> PiFlow:
    options = {"nfe": (1, 2, 4), "student": StudentOptions(policy_points=POINTS)}
    return PiFlow(PolicyAdapter(), validation=VALIDATION, **(options | settings))


def test_exact_policy_has_almost_no_loss_and_no_gradient() -> None:
    x0, losses, gradients = data_samples(256), [], []
    for bias in (0.0, 0.3):
        module = build(method(states=2))
        module.student.bias.data += bias
        torch.manual_seed(0)
        loss = module.objective(x0, empty_captions(256)).loss.mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append(module.student.bias.grad.abs().item())
    assert losses[0] < 1e-4 * losses[1]
    assert gradients[0] < 1e-2 * gradients[1]


def test_samples_of_the_exact_policy_are_ends_of_the_teacher_trajectory() -> None:
    module = build(method())
    noise = torch.randn(64, 3, 4, 4)
    for nfe in (1, 3):
        x0 = module.evaluator.sample_latents(noise, empty_captions(64), nfe, "student")
        torch.testing.assert_close(x0, GAUSSIAN.flow_map(noise, torch.ones(64), torch.zeros(64)), atol=2e-3, rtol=0)


def test_training_corrects_a_biased_policy(tmp_path: Path) -> None:
    module = build(method(nfe=(2,), optimizer=lambda p: torch.optim.Adam(p, lr=0.05)))
    module.student.bias.data += 0.5
    trainer(tmp_path, max_steps=30, max_epochs=-1, limit_val_batches=0).fit(module, loader())
    assert abs(module.student.bias.item()) < 0.05


def test_trajectory_states_need_no_images() -> None:
    assert method().needs_images
    assert not method(trajectory_fraction=1.0).needs_images


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"nfe": ()}, r"model\.nfe"),
        ({"nfe": (0,)}, r"model\.nfe"),
        ({"states": 0}, r"model\.states"),
        ({"student": StudentOptions()}, r"student\.policy_points is 1, and PiFlow trains policies"),
    ],
)
def test_error_for_invalid_settings_names_the_setting(settings: Any, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        method(**settings).setup("fit")


def test_start_states_are_ends_of_earlier_steps_of_the_same_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(method(trajectory_fraction=1.0, trajectory_steps=3))
    steps, average_velocity = set(), module.adapter.average_velocity

    def recorded(student: nn.Module, x_t: Tensor, r: Tensor, t: Tensor, *args: Any) -> Tensor:
        steps.update(zip(t.tolist(), r.tolist(), strict=True))
        return average_velocity(student, x_t, r, t, *args)

    monkeypatch.setattr(module.adapter, "average_velocity", recorded)
    step = torch.tensor([0, 1, 2, 3] * 4)
    grid = module.adapter.time_grid(4, (3, 4, 4))
    torch.manual_seed(0)
    x_t = module.starts(torch.full((16, 3, 4, 4), torch.nan), grid, step, unguided(16))
    torch.manual_seed(0)
    noise = torch.randn(16, 3, 4, 4)
    assert steps == set(zip(grid[:3].tolist(), grid[1:4].tolist(), strict=True))
    torch.testing.assert_close(x_t, GAUSSIAN.flow_map(noise, torch.ones(16), grid[step]), atol=2e-3, rtol=0)


def test_start_states_are_trajectory_states_or_noised_data() -> None:
    module = build(method(trajectory_fraction=0.5))
    grid, step, x0 = module.adapter.time_grid(2, (3, 4, 4)), torch.ones(64, dtype=torch.long), torch.full((64, 3, 4, 4), 9.0)
    torch.manual_seed(0)
    x_t = module.starts(x0, grid, step, unguided(64))
    torch.manual_seed(0)
    noise = torch.randn(64, 3, 4, 4)
    noised_data = (x_t - interpolate(x0, noise, grid[step])).abs().amax((1, 2, 3)) < 1e-5
    assert 20 < noised_data.sum() < 44
    expected = GAUSSIAN.flow_map(noise, torch.ones(64), grid[step])
    torch.testing.assert_close(x_t[~noised_data], expected[~noised_data], atol=2e-3, rtol=0)


def test_mixtures_are_float32_under_mixed_precision() -> None:
    outputs = torch.randn(8, 1, 3, 4, 4).expand(-1, 10, -1, -1, -1)
    tau, r, t = torch.full((8,), 2e-3), torch.zeros(8), torch.full((8,), 0.25)
    with torch.autocast("cpu", torch.bfloat16):
        v = mixture(outputs, velocity_weights(tau, r, t, 10))
    torch.testing.assert_close(v, outputs[:, 0], atol=1e-4, rtol=1e-4)
