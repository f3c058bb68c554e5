import math

import pytest
import torch

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.times import (
    LogitNormal,
    TimeSampler,
    Uniform,
    move_on_grid,
    sample_interval,
    shift_times,
    step_grid,
)

SAMPLERS = [LogitNormal(), LogitNormal(mean=0.5, std=2.0), Uniform(), Uniform(low=0.2, high=0.7)]
SIZE = 100_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_samplers_return_float32_times_in_0_1_from_the_generator(sampler):
    t = sampler(SIZE, "cpu", seeded())
    assert t.shape == (SIZE,)
    assert t.dtype == torch.float32
    assert 0 <= t.min() < t.max() <= 1
    assert torch.equal(t, sampler(SIZE, "cpu", seeded()))
    assert not torch.equal(t, sampler(SIZE, "cpu", seeded(1)))


@pytest.mark.parametrize(("mean", "std"), [(-0.4, 1.0), (0.5, 2.0)])
def test_logit_normal_times_have_normal_logits(mean, std):
    logits = torch.logit(LogitNormal(mean, std)(SIZE, generator=seeded()).double())
    assert logits.mean().item() == pytest.approx(mean, abs=5 * std / SIZE**0.5)
    assert logits.std().item() == pytest.approx(std, rel=5 / (2 * SIZE) ** 0.5)
    within_one = ((logits - mean).abs() < std).double().mean().item()
    assert within_one == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.01)


def test_uniform_times_are_uniform_in_their_range():
    t = Uniform(low=0.2, high=0.7)(SIZE, generator=seeded())
    assert t.min() >= 0.2
    assert t.max() <= 0.7
    counts = torch.histc(t, bins=10, min=0.2, max=0.7)
    assert (counts / SIZE - 0.1).abs().max() < 0.005


@pytest.mark.parametrize(
    "make", [lambda: LogitNormal(std=0.0), lambda: LogitNormal(std=-1.0), lambda: LogitNormal(std=math.nan)]
)
def test_logit_normal_with_nonpositive_std_raises(make):
    with pytest.raises(ConfigurationError, match="std"):
        make()


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.7, 0.2), (-0.1, 1.0), (0.0, 1.1)])
def test_uniform_with_invalid_range_raises(low, high):
    with pytest.raises(ConfigurationError, match="0 <= low < high <= 1"):
        Uniform(low, high)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_intervals_are_sorted(sampler):
    interval = sample_interval(sampler, 1000, generator=seeded())
    assert interval.r.shape == interval.t.shape == (1000,)
    assert (interval.r <= interval.t).all()


@pytest.mark.parametrize(
    ("batch", "fraction", "count"), [(64, 0.25, 16), (8, 0.0, 0), (8, 1.0, 8), (100, 0.29, 29), (30, 0.1, 3)]
)
def test_equal_fraction_is_exact_for_an_integer_number_of_rows(batch, fraction, count):
    for seed in range(20):
        interval = sample_interval(Uniform(), batch, fraction, generator=seeded(seed))
        assert (interval.r == interval.t).sum().item() == count


@pytest.mark.parametrize(("batch", "fraction"), [(1, 0.25), (2, 0.25), (5, 0.5)])
def test_equal_fraction_is_right_on_average_in_small_batches(batch, fraction):
    generator, samples = seeded(), 4000
    counts = [
        sum((interval.r == interval.t).tolist())
        for interval in (sample_interval(Uniform(), batch, fraction, generator=generator) for _ in range(samples))
    ]
    assert set(counts) == {math.floor(batch * fraction), math.ceil(batch * fraction)}
    assert sum(counts) / samples == pytest.approx(batch * fraction, abs=5 * 0.5 / samples**0.5)


def test_rows_with_equal_times_have_the_noisier_time():
    class Alternating(TimeSampler):
        samples = iter([0.3, 0.6])

        def __call__(self, batch, device=None, generator=None):
            return torch.full((batch,), next(self.samples))

    interval = sample_interval(Alternating(), 4, equal_fraction=0.5)
    torch.testing.assert_close(interval.t, torch.full((4,), 0.6))
    torch.testing.assert_close(interval.r, torch.tensor([0.6, 0.6, 0.3, 0.3]))


def test_sorted_uniform_times_have_order_statistics_of_two():
    interval = sample_interval(Uniform(), SIZE, equal_fraction=0.0, generator=seeded())
    assert interval.r.mean().item() == pytest.approx(1 / 3, abs=0.005)
    assert interval.t.mean().item() == pytest.approx(2 / 3, abs=0.005)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_equal_fraction_outside_0_1_raises(fraction):
    with pytest.raises(ConfigurationError, match="equal_fraction"):
        sample_interval(Uniform(), 4, fraction)


def test_shift_fixes_the_ends_moves_toward_noise_and_is_invertible():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_times(t, 3.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (shifted[1:-1] > t[1:-1]).all()
    assert shift_times(0.5, 3.0) == pytest.approx(0.75)
    torch.testing.assert_close(shift_times(shifted, 1 / 3.0), t)
    assert torch.equal(shift_times(t, 1.0), t)


def test_shift_multiplies_the_odds_of_noise():
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    shifted = shift_times(t, 2.5)
    torch.testing.assert_close(shifted / (1 - shifted), 2.5 * t / (1 - t))


@pytest.mark.parametrize("shift", [1.0, 0.5, 3.0, math.exp(1.15)])
@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 28, 32])
def test_grid_decreases_from_exactly_1_to_exactly_0(nfe, shift):
    grid = step_grid(nfe, shift)
    assert grid.shape == (nfe + 1,)
    assert grid.dtype == torch.float32
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid[1:] < grid[:-1]).all()
    expected = [shift * (k / nfe) / (1 + (shift - 1) * (k / nfe)) for k in range(nfe, -1, -1)]
    torch.testing.assert_close(grid, torch.tensor(expected, dtype=torch.float64).float(), rtol=2e-7, atol=0.0)


def test_even_grid_of_four_steps():
    assert step_grid(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(("nfe", "shift", "name"), [(0, 1.0, "nfe"), (-1, 1.0, "nfe"), (4, 0.0, "shift"), (4, -1.0, "shift")])
def test_grid_with_invalid_settings_raises(nfe, shift, name):
    with pytest.raises(ConfigurationError, match=name):
        step_grid(nfe, shift)


def test_move_on_grid_follows_the_grid():
    grid = step_grid(8, 3.0)
    torch.testing.assert_close(move_on_grid(grid, 1 / 8, 3.0), torch.cat([grid[1:], grid[-1:]]))
    torch.testing.assert_close(move_on_grid(torch.tensor([0.5]), 0.1), torch.tensor([0.4]))
