import torch

from lightning_distill.methods import TDM
from tests.methods.gaussian_adapter import GAUSSIAN, ExactTeacher, GaussianAdapter
from tests.methods.gaussian_runs import built, nothing_said
from tests.methods.test_meanflow import VALIDATION


def test_states_are_matched_within_the_segment_that_they_have_crossed() -> None:
    asked = []

    class Critic(ExactTeacher):
        def forward(self, x, r, t, caption):
            asked.append((r, t))
            return super().forward(x, r, t, caption)

    module = built(TDM(GaussianAdapter(), validation=VALIDATION, nfe=(4,)))
    module.matching.critic = Critic()
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        state, start = module.roll_out(torch.randn(64, 3, 4, 4), nothing_said(64))
        asked.clear()
        module.matching.critic_loss(module, state, nothing_said(64))
        module.matching.student_loss(module, state, nothing_said(64))
        torch.testing.assert_close(start - state.s, torch.full((64,), 0.25))
        seen.add(state.s[0].item())
        assert len(asked) == 2
        assert all(torch.equal(r, state.s) and (t > r).all() and (t < start).all() for r, t in asked)
    assert seen == {0.0, 0.25, 0.5, 0.75}


def test_it_samples_and_trains_by_jumps_along_the_trajectory() -> None:
    module = built(TDM(GaussianAdapter(), validation=VALIDATION, nfe=(4,)))
    noise = torch.randn(16, 3, 4, 4)
    for seed in range(4):
        torch.manual_seed(seed)
        state, _ = module.roll_out(noise, nothing_said(16))
        torch.testing.assert_close(state.x_s, GAUSSIAN.flow_map(noise, torch.ones(16), state.s))
        (gradient,) = torch.autograd.grad(state.x_s.sum(), module.student.bias)
        # x_s = x - (t - s) (u + bias): one segment of 1/4, and no dependence through earlier ones
        torch.testing.assert_close(gradient, torch.tensor(-0.25 * noise.numel()))
    assert not module.adapter.stochastic_sampling


def test_the_exact_critic_minimises_its_loss_within_a_segment() -> None:
    module = built(TDM(GaussianAdapter(), validation=VALIDATION, nfe=(2,)))
    critic = module.matching.critic = ExactTeacher()
    torch.manual_seed(0)
    state, _ = module.roll_out(torch.randn(8192, 3, 4, 4), nothing_said(8192))
    losses = []
    for offset in (-0.1, 0.0, 0.1):
        torch.manual_seed(1)
        critic.offset.fill_(offset)
        losses.append(module.matching.critic_loss(module, state, nothing_said(8192)).item())
    slope = (losses[2] - losses[0]) / 0.2
    curvature = (losses[2] - 2 * losses[1] + losses[0]) / 0.01
    assert abs(slope / curvature) < 0.02
