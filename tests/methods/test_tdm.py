from typing import Any

import torch

from lightning_distill.methods import TDM
from tests.methods.gaussian_adapter import GAUSSIAN, ExactTeacher, GaussianAdapter
from tests.methods.gaussian_runs import VALIDATION, build, unguided


def test_noise_levels_are_in_the_interval_of_the_last_step() -> None:
    times = []

    class Critic(ExactTeacher):
        def forward(self, x: Any, r: Any, t: Any, caption: Any) -> Any:
            times.append((r, t))
            return super().forward(x, r, t, caption)

    module = build(TDM(GaussianAdapter(), validation=VALIDATION, nfe=(4,)))
    module.matching.critic = Critic()
    ends = set()
    for seed in range(12):
        torch.manual_seed(seed)
        state, start = module.roll_out(torch.randn(64, 3, 4, 4), unguided(64))
        times.clear()
        module.matching.critic_loss(module.networks, state, unguided(64))
        module.matching.student_loss(module.networks, state, unguided(64))
        torch.testing.assert_close(start - state.s, torch.full((64,), 0.25))
        ends.add(state.s[0].item())
        assert len(times) == 2
        assert all(torch.equal(r, state.s) and (t > r).all() and (t < start).all() for r, t in times)
    assert ends == {0.0, 0.25, 0.5, 0.75}


def test_student_samples_and_trains_by_steps_along_the_trajectory() -> None:
    module = build(TDM(GaussianAdapter(), validation=VALIDATION, nfe=(4,)))
    noise = torch.randn(16, 3, 4, 4)
    for seed in range(4):
        torch.manual_seed(seed)
        state, _ = module.roll_out(noise, unguided(16))
        torch.testing.assert_close(state.x_s, GAUSSIAN.flow_map(noise, torch.ones(16), state.s))
        (gradient,) = torch.autograd.grad(state.x_s.sum(), module.student.bias)
        # x_s = x - (t - s) (u + bias): a step of 1/4, and no dependence through earlier ones
        torch.testing.assert_close(gradient, torch.tensor(-0.25 * noise.numel()))
    assert not module.adapter.stochastic_sampling


def test_exact_critic_minimises_its_loss_within_the_interval_of_a_step() -> None:
    module = build(TDM(GaussianAdapter(), validation=VALIDATION, nfe=(2,)))
    critic = module.matching.critic = ExactTeacher()
    torch.manual_seed(0)
    state, _ = module.roll_out(torch.randn(8192, 3, 4, 4), unguided(8192))
    losses = []
    for offset in (-0.1, 0.0, 0.1):
        torch.manual_seed(1)
        critic.offset.fill_(offset)
        losses.append(module.matching.critic_loss(module.networks, state, unguided(8192)).item())
    slope = (losses[2] - losses[0]) / 0.2
    curvature = (losses[2] - 2 * losses[1] + losses[0]) / 0.01
    assert abs(slope / curvature) < 0.02
