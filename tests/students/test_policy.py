"""Mixtures of a policy's outputs, against a finely integrated trajectory, and students with a policy."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_distill.commands.generation import sample
from lightning_distill.commands.pipelines import load_pipeline
from lightning_distill.errors import ConfigurationError
from lightning_distill.export.card import ModelCard
from lightning_distill.export.formats import FormatOptions
from lightning_distill.export.students import export_student
from lightning_distill.flow.derivative import finite_difference, value_and_time_derivative
from lightning_distill.students.policy import PolicyHead, flow_step_weights, position_weights, velocity_weights
from lightning_distill.students.two_time import TwoTimeModel
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from tests.teachers.tiny_families import save_family
from tests.tiny import PROMPTS, noise, sample_images

STEPS = [(0.0, 1.0), (0.0, 0.3), (0.4, 1.0), (0.25, 0.5), (0.9, 0.95)]


def interpolate_x0(x0: Tensor, r: float, t: float, tau: Tensor) -> Tensor:
    """Interpolate x0 (N,) at tau."""
    place = ((tau - r) / (t - r)).clamp(0, 1) * (len(x0) - 1)
    low = place.floor().long().clamp(max=len(x0) - 2)
    return x0[low] + (place - low) * (x0[low + 1] - x0[low])


def integrate_policy(x_t: float, v: Tensor, r: float, t: float, end: float, steps: int = 600) -> float:
    """State at `end` by Runge-Kutta steps, whose size shrinks with tau."""
    x0, x = x_t - t * v, torch.tensor(x_t, dtype=torch.float64)
    times = t * torch.linspace(0, math.log(max(end, 1e-6) / t), steps + 1, dtype=torch.float64).exp()

    def slope(x: Tensor, tau: Tensor) -> Tensor:
        return (x - interpolate_x0(x0, r, t, tau)) / tau

    for a, b in itertools.pairwise(times):
        h = b - a
        one = slope(x, a)
        two = slope(x + h / 2 * one, a + h / 2)
        three = slope(x + h / 2 * two, a + h / 2)
        x = x + h / 6 * (one + 2 * two + 2 * three + slope(x + h * three, b))
    return x.item()


@pytest.mark.parametrize(("r", "t"), STEPS)
@pytest.mark.parametrize("points", [2, 5])
def test_states_and_velocities_match_the_integrated_trajectory(r: float, t: float, points: int) -> None:
    v = torch.randn(points, dtype=torch.float64, generator=torch.Generator().manual_seed(points))
    x_t = 0.7
    for share in (0.03, 0.5, 0.9):
        tau = r + share * (t - r)
        times = [torch.tensor([time]) for time in (tau, r, t)]
        x_tau = x_t - (t - tau) * (position_weights(*times, points).double()[0] @ v).item()
        assert x_tau == pytest.approx(integrate_policy(x_t, v, r, t, tau), abs=2e-5)
        slope = (x_tau - interpolate_x0(x_t - t * v, r, t, torch.tensor(tau, dtype=torch.float64)).item()) / tau
        assert (velocity_weights(*times, points).double()[0] @ v).item() == pytest.approx(slope, abs=2e-4)
    x_r = x_t - (t - r) * (flow_step_weights(torch.tensor([r]), torch.tensor([t]), points).double()[0] @ v).item()
    assert x_r == pytest.approx(integrate_policy(x_t, v, r, t, r), abs=1e-4)


def test_step_to_0_reaches_the_x0_prediction_at_0() -> None:
    weights = flow_step_weights(torch.zeros(3), torch.tensor([1.0, 0.5, 0.1]), 4)
    assert torch.equal(weights, torch.tensor([[1.0, 0, 0, 0]]).expand(3, -1))


def test_step_of_length_0_is_the_limit_of_short_steps() -> None:
    times = torch.tensor([1.0, 0.3], dtype=torch.float64)
    expected = torch.tensor([[0.25, 0.5, 0.25]]).expand(2, -1)
    torch.testing.assert_close(flow_step_weights(times, times, 3), expected)
    torch.testing.assert_close(flow_step_weights(times - 1e-4, times, 3), expected, atol=1e-3, rtol=0)


def test_weights_sum_to_one() -> None:
    t = torch.linspace(0.05, 1, 20)
    r = 0.6 * t
    tau = r + 0.3 * (t - r)
    for weights in (position_weights(tau, r, t, 6), velocity_weights(tau, r, t, 6), flow_step_weights(r, t, 6)):
        torch.testing.assert_close(weights.sum(1), torch.ones(20))


def test_policy_head_equals_its_layer_at_the_start_and_mixes_its_outputs() -> None:
    layer, x = nn.Linear(5, 3), torch.randn(2, 7, 5)
    head = PolicyHead(layer, points=4)
    head.load_state_dict(layer.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="call the transformer"):
        head(x)
    head.mixture = torch.rand(2, 1, 4)
    torch.testing.assert_close(head(x), layer(x))
    nn.init.normal_(head.grid.weight)
    head.mixture = torch.eye(4).expand(2, -1, -1)
    each = head(x).unflatten(0, (2, 4))
    assert (each[:, 0] - each[:, 1]).abs().max() > 0.1
    weights = torch.rand(2, 1, 4).softmax(-1)
    head.mixture = weights
    torch.testing.assert_close(head(x), torch.einsum("bmn,bnlo->blo", weights, each))
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x).dtype == torch.bfloat16
        head.mixture = torch.eye(4).expand(2, -1, -1)
        outputs = head(x)  # callers compute their differences
    assert outputs.dtype == torch.float32
    assert not torch.equal(outputs, outputs.bfloat16().float())


# FLUX students


def policy_student(adapter: DiffusersAdapter, **options: Any) -> TwoTimeModel:
    """Student with a policy of 4 outputs."""
    settings = StudentOptions(time_embedding="original", policy_points=4, **options)
    adapter.check_student(settings)
    student, _ = adapter.build_student(adapter.load_teacher(), settings)
    return student


def test_all_outputs_of_a_new_student_equal_the_teacher(adapter: DiffusersAdapter) -> None:
    student, teacher = policy_student(adapter), adapter.load_teacher()
    condition, x = adapter.encode_prompt(PROMPTS), noise(len(PROMPTS))
    r, t = torch.tensor([0.0, 0.3, 0.6]), torch.tensor([1.0, 0.9, 0.6])
    with torch.no_grad():
        v = adapter.velocity(teacher, x, t, condition)
        torch.testing.assert_close(adapter.average_velocity(student, x, r, t, condition), v)
        for each in adapter.policy(student, x, r, t, condition).unbind(1):
            torch.testing.assert_close(each, v)


@pytest.mark.parametrize("lora", [None, LoraOptions(rank=2)])
def test_average_velocity_is_the_mixture_of_the_outputs(adapter: DiffusersAdapter, lora: LoraOptions | None) -> None:
    student = policy_student(adapter, lora=lora)
    grid = student.policy_head.grid.weight
    assert grid.requires_grad
    assert grid.dtype == torch.float32
    nn.init.normal_(grid, std=0.1)
    condition, x = adapter.encode_prompt(PROMPTS), noise(len(PROMPTS))
    r, t = torch.tensor([0.0, 0.3, 0.5]), torch.tensor([1.0, 0.9, 0.6])
    u = adapter.average_velocity(student, x, r, t, condition)
    outputs = adapter.policy(student, x, r, t, condition)
    assert outputs.shape == (3, 4, *x.shape[1:])
    torch.testing.assert_close(u, torch.einsum("bn,bnchw->bchw", flow_step_weights(r, t, 4), outputs), atol=1e-5, rtol=1e-5)
    u.square().mean().backward()
    assert grid.grad.abs().max() > 0


def test_time_derivative_of_a_policy_student_is_exact(adapter: DiffusersAdapter) -> None:
    student = policy_student(adapter)
    nn.init.normal_(student.policy_head.grid.weight, std=0.3)
    condition, x, v = adapter.encode_prompt(PROMPTS), noise(len(PROMPTS)), noise(len(PROMPTS), 10)
    r, t = torch.tensor([0.0, 0.3, 0.5]), torch.tensor([1.0, 0.9, 0.6])

    def u(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return adapter.average_velocity(student, x, r, t, condition)

    student.double()
    x, v, r, t = (each.double() for each in (x, v, r, t))
    _, derivative = value_and_time_derivative(u, x, r, t, v)
    expected = finite_difference(u, x, r, t, v, 1e-4)
    assert (derivative - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("lora", [None, "unmerged"])
def test_exported_student_generates_the_images_of_training(adapter: DiffusersAdapter, lora: str | None, tmp_path: Path) -> None:
    student = policy_student(adapter, lora=LoraOptions(rank=2) if lora else None)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    images = sample_images(adapter, student, PROMPTS, 2)
    card = ModelCard("PiFlow", str(adapter.pretrained), (2,), 32, 32)
    export_student(adapter, student, tmp_path / "student", card, options=FormatOptions(lora=lora or "merged"))
    pipeline = load_pipeline(str(tmp_path / "student"), base=str(adapter.pretrained) if lora else None)
    torch.testing.assert_close(sample(pipeline, PROMPTS, nfe=2), images, atol=2e-5, rtol=0)


def test_student_starts_from_an_exported_policy_student(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    before = policy_student(adapter)
    nn.init.normal_(before.policy_head.grid.weight, std=0.1)
    adapter.save_student(before, tmp_path / "student")
    after = policy_student(adapter, pretrained=str(tmp_path / "student"))
    assert torch.equal(after.policy_head.grid.weight, before.policy_head.grid.weight)
    with pytest.raises(ConfigurationError, match="policy_points is 4, but this configuration has 1"):
        adapter.check_student(StudentOptions(time_embedding="original", pretrained=str(tmp_path / "student")))


def test_family_without_policies_raises(tmp_path: Path) -> None:
    save_family("stable_diffusion_3", tmp_path / "teacher")
    adapter = DiffusersAdapter(str(tmp_path / "teacher"))
    adapter.check()
    with pytest.raises(
        ConfigurationError, match=r"student\.policy_points is 4, but TwoTimeSD3.* does not support policies; set it"
    ):
        adapter.check_student(StudentOptions(policy_points=4))
