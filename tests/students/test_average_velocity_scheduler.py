import itertools
from pathlib import Path

import pytest
import torch

from lightning_distill.flow.path import flow_step
from lightning_distill.flow.times import step_grid
from lightning_distill.students.average_velocity_scheduler import AverageVelocityScheduler


@pytest.mark.parametrize("shift", [1.0, 1.7, 3.0])
@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 7, 32])
def test_time_grid_equals_the_training_grid(nfe: int, shift: float) -> None:
    scheduler = AverageVelocityScheduler(shift=shift)
    scheduler.set_timesteps(nfe)
    assert torch.equal(scheduler.times, step_grid(nfe, shift))
    assert len(scheduler) == nfe
    assert torch.equal(scheduler.timesteps, step_grid(nfe, shift)[:-1])


def test_given_shift_overrides_the_configured_shift() -> None:
    scheduler = AverageVelocityScheduler(use_dynamic_shifting=True, shift=3.0)
    scheduler.set_timesteps(4, shift=2.2)
    assert torch.equal(scheduler.times, step_grid(4, 2.2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_equals_flow_step_bit_for_bit(dtype: torch.dtype) -> None:
    scheduler = AverageVelocityScheduler(shift=1.7)
    scheduler.set_timesteps(5)
    x = torch.randn(3, 16, 8)
    for t, r in scheduler.intervals:
        u = torch.randn(3, 16, 8).to(dtype)
        expected = flow_step(x, u.float(), r.expand(3), t.expand(3))
        (x,) = scheduler.step(u, t, x, return_dict=False)
        assert x.dtype == torch.float32
        assert torch.equal(x, expected)


def test_step_accepts_a_float_and_returns_a_scheduler_output() -> None:
    scheduler = AverageVelocityScheduler()
    scheduler.set_timesteps(2)
    x = scheduler.step(torch.ones(1, 1), 0.5, torch.ones(1, 1)).prev_sample
    assert x.item() == 0.5


def test_stochastic_step_predicts_x0_and_renoises() -> None:
    scheduler = AverageVelocityScheduler(shift=1.7, stochastic_sampling=True)
    scheduler.set_timesteps(3)
    generators, expected_generators = ([torch.Generator().manual_seed(i) for i in range(2)] for _ in range(2))
    x = torch.randn(2, 16, 8)
    for (t, r), end in zip(scheduler.intervals, scheduler.times[1:], strict=True):
        assert r == 0
        u = torch.randn(2, 16, 8)
        x0 = x - t * u
        noise = torch.stack([torch.randn(16, 8, generator=generator) for generator in expected_generators]) if end > 0 else 0
        (x,) = scheduler.step(u, t, x, generators, return_dict=False)
        torch.testing.assert_close(x, (1 - end) * x0 + end * noise)


def test_intervals_are_contiguous_from_noise_to_data() -> None:
    scheduler = AverageVelocityScheduler(shift=2.0)
    scheduler.set_timesteps(4)
    intervals = scheduler.intervals
    assert intervals[0][0] == 1
    assert intervals[-1][1] == 0
    assert all(this[1] == following[0] for this, following in itertools.pairwise(intervals))


def test_configuration_is_saved_and_loaded(tmp_path: Path) -> None:
    settings = {
        "shift": 2.5,
        "use_dynamic_shifting": True,
        "base_shift": 0.4,
        "max_shift": 1.3,
        "base_image_seq_len": 16,
        "max_image_seq_len": 99,
    }
    AverageVelocityScheduler(**settings).save_pretrained(tmp_path)
    loaded = AverageVelocityScheduler.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in settings} == settings


def test_invalid_arguments_raise() -> None:
    with pytest.raises(ValueError, match="num_inference_steps is 0; set it to at least 1"):
        AverageVelocityScheduler().set_timesteps(0)
    with pytest.raises(ValueError, match="pass the shift"):
        AverageVelocityScheduler(use_dynamic_shifting=True).set_timesteps(2)
    scheduler = AverageVelocityScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"no step starts at timestep 0\.7"):
        scheduler.step(torch.ones(1), 0.7, torch.ones(1))
