from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from lightning_distill.flow.derivative import time_derivative
from lightning_distill.students.two_time_flux import TwoTimeFluxTransformer2DModel
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.student_options import StudentOptions
from tests.tiny import PROMPTS, noise, perturb_weights

GEOMETRY = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (8, 12, 12),
}
INTERVALS = [(0.0, 1.0), (0.5, 1.0), (0.0, 0.37), (0.123, 0.456), (0.8, 0.8), (0.0, 0.0)]


def inputs(batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    image_ids = torch.zeros(16, 3)
    image_ids[:, 1], image_ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return {
        "hidden_states": torch.randn(batch, 16, 64).to(dtype),
        "encoder_hidden_states": torch.randn(batch, 8, 16).to(dtype),
        "pooled_projections": torch.randn(batch, 16).to(dtype),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(8, 3),
        "return_dict": False,
    }


def student(**options: Any) -> TwoTimeFluxTransformer2DModel:
    network = TwoTimeFluxTransformer2DModel(**{**GEOMETRY, "interval_embedding": "zero", **options})
    network.reset_interval_embedding()
    return network


@pytest.fixture(params=["adapter", "guided_adapter"])
def any_adapter(request: pytest.FixtureRequest) -> DiffusersAdapter:
    return request.getfixturevalue(request.param)


def velocities(adapter: DiffusersAdapter, options: StudentOptions, trained: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Velocities of a new student and of its teacher at several (r, t)."""
    teacher = adapter.load_teacher()
    network, _ = adapter.build_student(teacher, options)
    if trained:
        perturb_weights(network)
    condition, x, guidance = adapter.encode_prompt(PROMPTS), noise(len(PROMPTS)), 4.5
    results = []
    with torch.no_grad():
        for r, t in INTERVALS:
            end, start = torch.full((len(x),), r), torch.full((len(x),), t)
            u = adapter.average_velocity(network, x, end, start, condition, guidance)
            results.append((u, adapter.velocity(teacher, x, start, condition, guidance)))
    return results


def test_new_student_equals_the_teacher_for_every_interval(any_adapter: DiffusersAdapter) -> None:
    for u, v in velocities(any_adapter, StudentOptions(time_embedding="original")):
        assert torch.equal(u, v)


def test_reset_interval_embedding_preserves_rng_states(monkeypatch: pytest.MonkeyPatch) -> None:
    network = student()
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    state = torch.get_rng_state()
    network.reset_interval_embedding()
    assert torch.equal(torch.get_rng_state(), state)
    assert seeds == []


def test_trained_student_differs_from_the_teacher(any_adapter: DiffusersAdapter) -> None:
    for u, v in velocities(any_adapter, StudentOptions(time_embedding="original"), trained=True):
        assert not torch.allclose(u, v, rtol=1e-3)


def test_cloned_interval_embedding_changes_the_output(any_adapter: DiffusersAdapter) -> None:
    for u, v in velocities(any_adapter, StudentOptions(time_embedding="original", interval_embedding="clone")):
        assert (u - v).norm() / v.norm() > 1e-3


def test_new_student_with_smooth_time_equals_the_teacher_up_to_the_fit_error(any_adapter: DiffusersAdapter) -> None:
    teacher = any_adapter.load_teacher()
    network, report = any_adapter.build_student(teacher, StudentOptions())
    assert report is not None
    assert report.derivative_after < report.derivative_before

    t = torch.rand(400)
    with torch.no_grad():
        old = teacher.timestep_embedders[0].embed_times(t, t)
        new = network.timestep_embedders[0].embed_times(t, torch.rand(400) * t)
    assert (new - old).norm() / (old - old.mean(0)).norm() < 1.2 * report.fit_error
    for u, v in velocities(any_adapter, StudentOptions()):
        assert (u - v).norm() / v.norm() < 0.5 * report.fit_error


def test_omitted_r_equals_r_equal_to_t() -> None:
    network, given, t = perturb_weights(student()), inputs(), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        assert torch.equal(network(timestep=t, timestep_r=t, **given)[0], network(timestep=t, **given)[0])
        assert not torch.equal(network(timestep=t, timestep_r=t / 2, **given)[0], network(timestep=t, **given)[0])


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_default_settings_equal_the_stock_transformer(guidance_embeds: bool, tmp_path: Path) -> None:
    stock = FluxTransformer2DModel(**GEOMETRY, guidance_embeds=guidance_embeds)
    stock.save_pretrained(tmp_path)
    network = TwoTimeFluxTransformer2DModel.from_pretrained(tmp_path)
    given, t = inputs(), torch.tensor([0.25, 1.0])
    guidance = torch.tensor([1.0, 3.5]) if guidance_embeds else None
    with torch.no_grad():
        expected = stock(timestep=t, guidance=guidance, **given)[0]
        assert torch.equal(network(timestep=t, guidance=guidance, **given)[0], expected)
        assert not torch.equal(network(timestep=t - 0.1, guidance=guidance, **given)[0], expected)


def test_return_dict_wraps_the_output() -> None:
    network, given = student(), {**inputs(), "return_dict": True}
    assert network(timestep=torch.ones(2), **given).sample.shape == (2, 16, 64)


def test_network_is_saved_and_loaded(tmp_path: Path) -> None:
    network = perturb_weights(student(time_frequency_bound=5.0, interval_frequency_bound=4.0, guidance_embeds=True))
    network.save_pretrained(tmp_path)
    loaded = TwoTimeFluxTransformer2DModel.from_pretrained(tmp_path)
    given, t, r, guidance = inputs(), torch.tensor([0.5, 0.9]), torch.tensor([0.1, 0.9]), torch.tensor([2.0, 4.0])
    with torch.no_grad():
        before = network(timestep=t, timestep_r=r, guidance=guidance, **given)[0]
        assert torch.equal(loaded(timestep=t, timestep_r=r, guidance=guidance, **given)[0], before)


def test_smooth_and_rescaled_time_raise() -> None:
    with pytest.raises(ValueError, match="rescaled_time needs the model's original time features"):
        student(time_frequency_bound=5.0, rescaled_time=True)


# Precision


def relative_tangent_error(network: Any, run: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor]) -> float:
    t = torch.tensor([0.31, 0.77])

    def derivative(function: Callable[[Tensor], Tensor]) -> Tensor:
        zeros = torch.zeros(2, 1)
        return time_derivative(lambda x, r, s: function(s).float(), zeros, torch.zeros(2), t, zeros)[1]

    expected = derivative(reference)
    return ((derivative(run) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("method", ["cast", "autocast"])
def test_derivative_along_t_is_accurate_in_bfloat16(method: str) -> None:
    reference = student(time_frequency_bound=None)
    network = student(time_frequency_bound=None)
    network.load_state_dict(reference.state_dict())
    if method == "cast":
        network.to(torch.bfloat16)
    given = inputs(dtype=torch.float32)
    low = {
        k: v.to(torch.bfloat16) if method == "cast" and k.endswith(("states", "projections")) else v for k, v in given.items()
    }
    context = torch.autocast("cpu", torch.bfloat16) if method == "autocast" else nullcontext()

    def run(t: Tensor) -> Tensor:
        with context:
            return network(timestep=t, timestep_r=t.detach() / 2, **low)[0]

    def exact(t: Tensor) -> Tensor:
        return reference(timestep=t, timestep_r=t.detach() / 2, **given)[0]

    assert relative_tangent_error(network, run, exact) < 0.03

    # The stock transformer rounds times, so its derivative is that of another function.
    stock = FluxTransformer2DModel(**GEOMETRY)
    stock.load_state_dict(reference.state_dict(), strict=False)
    if method == "cast":
        stock.to(torch.bfloat16)

        def run_stock(t: Tensor) -> Tensor:
            return stock(timestep=t.to(torch.bfloat16), **low)[0]

        assert relative_tangent_error(stock, run_stock, exact) > 0.3


@pytest.mark.parametrize("method", ["to", "half", "from_pretrained"])
def test_time_embedders_stay_float32(method: str, tmp_path: Path) -> None:
    network = perturb_weights(student(guidance_embeds=True))
    dtype = torch.float16 if method == "half" else torch.bfloat16
    weights = [value.clone() for name, value in network.named_parameters() if "timestep_embedder" in name]
    if method == "from_pretrained":
        network.save_pretrained(tmp_path)
        network = TwoTimeFluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    else:
        network = network.half() if method == "half" else network.to(dtype)
    for name, parameter in network.named_parameters():
        assert parameter.dtype == (torch.float32 if "timestep_embedder" in name else dtype), name
    assert network.dtype == dtype
    restored = [value for name, value in network.named_parameters() if "timestep_embedder" in name]
    assert all(torch.equal(value, before) for value, before in zip(restored, weights, strict=True))
    assert network(timestep=torch.rand(2), guidance=torch.ones(2), **inputs(dtype=dtype))[0].dtype == dtype


def test_student_is_float32_with_a_bfloat16_teacher(teacher_directory: str) -> None:
    """At the start the student equals the teacher up to the teacher's rounding."""
    adapter = DiffusersAdapter(teacher_directory, torch_dtype="bfloat16")
    adapter.check()
    adapter.load()
    teacher = adapter.load_teacher()
    network, _ = adapter.build_student(teacher, StudentOptions(time_embedding="original"))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert teacher.x_embedder.weight.dtype == torch.bfloat16
    assert teacher.time_text_embed.timestep_embedder.linear_1.weight.dtype == torch.float32
    x, t = noise(1), torch.tensor([0.7])
    with torch.no_grad():
        condition = adapter.encode_prompt(["a circle"])
        u = adapter.average_velocity(network, x, t / 2, t, condition)
        v = adapter.velocity(teacher, x, t, condition)
    assert (u - v).norm() / v.norm() < 0.03


# Training


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    network, given = perturb_weights(student()), inputs()
    t, r = torch.tensor([0.5, 0.9]), torch.tensor([0.1, 0.4])
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            network.enable_gradient_checkpointing()
        network.zero_grad()
        network(timestep=t, timestep_r=r, **given)[0].square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in network.named_parameters()})
    assert network.gradient_checkpointing
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
        assert gradient.abs().sum() > 0, name


def test_interval_embedder_of_a_new_student_gets_a_gradient() -> None:
    network = student()
    network(timestep=torch.ones(2), timestep_r=torch.zeros(2), **inputs())[0].square().sum().backward()
    assert network.timestep_embedders[0].interval_embedder.linear_2.weight.grad.abs().sum() > 0


def test_invalid_interval_embedding_raises() -> None:
    with pytest.raises(ValueError, match="choose 'none', 'zero' or 'clone'"):
        TwoTimeFluxTransformer2DModel(**GEOMETRY, interval_embedding="other")
    with pytest.raises(ValueError, match="no interval embedder to reset"):
        TwoTimeFluxTransformer2DModel(**GEOMETRY).reset_interval_embedding()
