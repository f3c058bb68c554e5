"""The time update against closed forms, and at what other tools feed to the embedder."""

import math

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError, NonFiniteError
from lightning_distill.flow.times import step_grid
from lightning_distill.teachers.time_update import TimeUpdate, merged_weight, solve_time_update

WIDTH, OUT = 64, 24


@pytest.fixture
def embedder() -> TimestepEmbedding:
    torch.manual_seed(0)
    return TimestepEmbedding(256, WIDTH, out_dim=OUT)


def flux_features(timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    """Features of FLUX in diffusers, whose pipeline rounds the times."""
    return get_timestep_embedding(timesteps.to(dtype) / 1000 * 1000.0, 256, flip_sin_to_cos=True, downscale_freq_shift=0)


def solve(embedder: TimestepEmbedding, timesteps: Tensor, target: Tensor) -> TimeUpdate:
    return solve_time_update("linear_2", embedder.linear_1, embedder.act, embedder.linear_2, flux_features, timesteps, target)


def embed(embedder: TimestepEmbedding, update: TimeUpdate, features: Tensor) -> Tensor:
    """Embedding of the updated embedder, in the dtype of the features."""
    copy = TimestepEmbedding(256, WIDTH, out_dim=OUT)
    copy.load_state_dict(embedder.state_dict())
    copy.linear_2.weight.data = merged_weight(embedder.linear_2.weight, update)
    return copy.to(features.dtype)(features).float()


@torch.no_grad()
@pytest.mark.parametrize("nfe", [1, 2, 4, 8])
def test_updated_embedder_has_the_targets_in_float32(embedder: TimestepEmbedding, nfe: int) -> None:
    timesteps, target = step_grid(nfe, 3.0)[:-1] * 1000, torch.randn(nfe, OUT)
    update = solve(embedder, timesteps, target)
    torch.testing.assert_close(embed(embedder, update, flux_features(timesteps, torch.float32)), target, rtol=0, atol=2e-5)
    assert update.residual < 1e-5
    assert update.condition_number >= 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tool", ["diffusers", "ComfyUI"])
def test_updated_embedder_has_the_targets_in_16_bits(embedder: TimestepEmbedding, tool: str, dtype: torch.dtype) -> None:
    """diffusers rounds the times as well; ComfyUI computes the features of exact times and rounds them."""
    timesteps, target = step_grid(4, 3.0)[:-1] * 1000, torch.randn(4, OUT)
    assert (timesteps.to(torch.bfloat16).float() != timesteps).any()
    update = solve(embedder, timesteps, target)
    features = flux_features(timesteps, dtype if tool == "diffusers" else torch.float32).to(dtype)
    error = (embed(embedder, update, features) - target).norm() / target.norm()
    assert error < 4 * torch.finfo(dtype).eps


@torch.no_grad()
def test_factors_can_be_rounded_to_bfloat16(embedder: TimestepEmbedding) -> None:
    """As pipelines in bfloat16 do; the hidden vectors are nearly parallel."""
    embedder.linear_1.weight.mul_(0.005)
    grid = step_grid(8, 3.0) * 1000
    update = solve(embedder, grid[:-1], embedder(flux_features(grid[1:], torch.float32)))
    assert update.condition_number > 50
    exact, rounded = (b.double() @ a.double() for a, b in ((update.A, update.B), (update.A.bfloat16(), update.B.bfloat16())))
    assert (rounded - exact).norm() < torch.finfo(torch.bfloat16).eps * exact.norm()
    scale = update.A.norm().square().item()
    torch.testing.assert_close(update.A @ update.A.T, update.B.T @ update.B, rtol=0, atol=1e-4 * scale)


@torch.no_grad()
def test_update_is_zero_if_the_embedder_has_the_targets_already(embedder: TimestepEmbedding) -> None:
    timesteps = torch.tensor([1000.0, 500.0])  # exact in 16 bits
    update = solve(embedder, timesteps, embedder(flux_features(timesteps, torch.float32)))
    assert len(update.A) == 2
    assert (update.B @ update.A).abs().max() < 1e-5


@torch.no_grad()
def test_rank_is_the_number_of_different_times(embedder: TimestepEmbedding) -> None:
    timesteps = step_grid(2, 3.0)[:-1] * 1000  # 1000 and 750
    # bfloat16 rounds 750 to 752. Dividing by 1000 and multiplying again rounds further times.
    fed = {(timesteps.to(dtype) / 1000 * 1000.0).float()[i].item() for dtype in (torch.bfloat16, torch.float16) for i in (0, 1)}
    assert len(solve(embedder, timesteps, torch.randn(2, OUT)).A) == len(fed | {1000.0, 750.0})


@torch.no_grad()
def test_rank_is_the_number_of_steps_if_pipelines_round_no_times(embedder: TimestepEmbedding) -> None:
    def features(timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        return flux_features(timesteps, torch.float32)

    layers = embedder.linear_1, embedder.act, embedder.linear_2
    update = solve_time_update("linear_2", *layers, features, step_grid(4, 3.0)[:-1] * 1000, torch.randn(4, OUT))
    assert len(update.A) == 4


def test_equal_times_raise(embedder: TimestepEmbedding) -> None:
    timesteps = torch.tensor([1000.0, 999.9])
    with pytest.raises(ConfigurationError, match="nfe is 2, but steps 1 and 2 have the same time in 16 bits"):
        solve(embedder, timesteps, torch.randn(2, OUT))


def test_more_steps_than_hidden_units_raise() -> None:
    embedder = TimestepEmbedding(256, 2, out_dim=OUT)
    with pytest.raises(ConfigurationError, match=r"cannot separate these steps \(relative error .*\); export fewer steps"):
        solve(embedder, step_grid(4, 3.0)[:-1] * 1000, torch.randn(4, OUT))


def test_a_target_that_is_not_finite_raises(embedder: TimestepEmbedding) -> None:
    with pytest.raises(NonFiniteError, match="a time embedding is NaN or infinite"):
        solve(embedder, torch.tensor([1000.0]), torch.full((1, OUT), math.nan))


def test_an_embedder_without_biases(embedder: TimestepEmbedding) -> None:
    embedder.linear_1, embedder.linear_2 = (
        nn.Linear(each.in_features, each.out_features, bias=False) for each in (embedder.linear_1, embedder.linear_2)
    )
    target = torch.randn(2, OUT)
    with torch.no_grad():
        update = solve(embedder, torch.tensor([1000.0, 500.0]), target)
        hidden = embedder.act(embedder.linear_1(flux_features(torch.tensor([1000.0, 500.0]), torch.float32)))
        torch.testing.assert_close(hidden @ merged_weight(embedder.linear_2.weight, update).T, target, rtol=0, atol=1e-5)
