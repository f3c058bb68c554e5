from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods import Guidance, MeanFlow, TrajectoryAlignment
from lightning_distill.methods.critic import TrajectoryState
from lightning_distill.methods.networks import GuidedCondition
from tests.methods.gaussian_adapter import GAUSSIAN, ExactTeacher, GaussianAdapter
from tests.methods.gaussian_runs import VALIDATION, build, empty_captions, loader, meanflow, trainer, unguided


def aligned(**settings: Any) -> MeanFlow:
    """MeanFlow with an alignment whose critic is the teacher's velocity plus an offset, for every s."""
    module = meanflow(**settings)
    assert module.alignment is not None
    module.alignment.critic = ExactTeacher()
    return module


class Losses(Callback):
    """Records the losses of each step."""

    def __init__(self) -> None:
        self.recorded: list[float] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        names = ("loss", "critic_loss", "alignment_loss")
        self.recorded += [trainer.callback_metrics[f"train/{name}"].item() for name in names]


def test_losses_equal_recorded_ones(tmp_path: Path) -> None:
    """Recorded before alignment, DMD2 and TDM shared their critic."""
    torch.manual_seed(0)
    alignment = TrajectoryAlignment(critic_lr=1e-2, critic_updates=2, guidance_scale=2.0)
    adapter = GaussianAdapter("small", teacher="small")
    module = build(MeanFlow(adapter, validation=VALIDATION, alignment=alignment, optimizer=lambda p: torch.optim.Adam(p, 1e-2)))
    losses = Losses()
    trainer(tmp_path, limit_val_batches=0, callbacks=[losses]).fit(module, loader())
    expected = [
        *(0.14178156852722168, 2.094195604324341, 0.03219472989439964),
        *(0.08190268278121948, 1.8888111114501953, 0.030616816133260727),
        *(0.12913398444652557, 1.5082252025604248, 0.09721505641937256),
        *(0.04836006835103035, 2.0085577964782715, 0.027591945603489876),
    ]
    assert losses.recorded == pytest.approx(expected, rel=1e-5)


def test_training_changes_critic_and_student_but_not_the_teacher(tmp_path: Path) -> None:
    adapter = GaussianAdapter("small", teacher="small")
    module = build(MeanFlow(adapter, validation=VALIDATION, alignment=TrajectoryAlignment(critic_lr=1e-2)))
    networks = {"teacher": module.teacher, "student": module.student, "critic": module.alignment.critic}
    before = {name: [p.clone() for p in network.parameters()] for name, network in networks.items()}
    trainer(tmp_path, limit_val_batches=0).fit(module, loader())
    changed = {
        name: any(not torch.equal(a, b) for a, b in zip(before[name], network.parameters(), strict=True))
        for name, network in networks.items()
    }
    assert changed == {"teacher": False, "student": True, "critic": True}


def test_exact_critic_minimises_its_loss_at_every_grid_time() -> None:
    """Diffused states of the flow at s have the marginals of the path, whose velocity is the teacher's."""
    module = aligned(alignment=TrajectoryAlignment())
    critic, noise = module.alignment.critic, torch.randn(4096, 3, 4, 4)
    for s in (0.0, 0.25, 0.5):
        times = torch.full((4096,), s)
        state = TrajectoryState(GAUSSIAN.flow_map(noise, torch.ones(4096), times), times)
        losses = []
        for offset in (-0.1, 0.0, 0.1):
            torch.manual_seed(1)
            critic.offset.fill_(offset)
            losses.append(module.alignment.critic_loss(module.networks, state, unguided(4096)).item())
        slope = (losses[2] - losses[0]) / 0.2
        curvature = (losses[2] - 2 * losses[1] + losses[0]) / 0.01
        assert abs(slope / curvature) < 0.01


def test_critic_loss_has_similar_size_along_the_trajectory() -> None:
    module = aligned(alignment=TrajectoryAlignment())
    noise, losses = torch.randn(2048, 3, 4, 4), []
    for s in (0.0, 0.5, 0.9):
        times = torch.full((2048,), s)
        state = TrajectoryState(GAUSSIAN.flow_map(noise, torch.ones(2048), times), times)
        losses.append(module.alignment.critic_loss(module.networks, state, unguided(2048)).item())
    assert max(losses) < 3 * min(losses)


def test_exact_student_with_exact_critic_has_no_loss() -> None:
    module = aligned(alignment=TrajectoryAlignment())
    state = module.alignment.roll_out(module.networks, torch.randn(64, 3, 4, 4), unguided(64))
    assert module.alignment.student_loss(module.networks, state, unguided(64)).max() < 1e-10


def test_critic_receives_the_grid_time_of_the_states() -> None:
    """States of different grid times have different distributions, so that one score cannot fit them all."""
    times = []

    class Critic(ExactTeacher):
        def forward(self, x: Any, r: Any, t: Any, caption: Any) -> Any:
            times.append((r, t))
            return super().forward(x, r, t, caption)

    module = meanflow(alignment=TrajectoryAlignment())
    module.alignment.critic = Critic()
    s = torch.full((8,), 0.5)
    state = TrajectoryState(torch.randn(8, 3, 4, 4), s)
    module.alignment.critic_loss(module.networks, state, unguided(8))
    module.alignment.student_loss(module.networks, state, unguided(8))
    assert len(times) == 2
    assert all(torch.equal(r, s) and (t > s).all() and (t < 1).all() for r, t in times)


def test_guidance_scale_of_the_alignment_replaces_that_of_the_student() -> None:
    """A student of guidance 2 has a loss only if the alignment's teacher has another scale."""
    condition = GuidedCondition({"caption": torch.full((64,), 0.5)}, empty_captions(64), torch.full((64,), 2.0))
    losses = []
    for guidance_scale in (None, 2.0, 3.0):
        module = aligned(guidance=Guidance(scale=2.0), alignment=TrajectoryAlignment(guidance_scale=guidance_scale))
        module.alignment.critic.offset.fill_(0.5)  # guidance 2 adds the caption's value to the velocity a second time
        state = TrajectoryState(torch.randn(64, 3, 4, 4), torch.zeros(64))
        torch.manual_seed(0)
        losses.append(module.alignment.student_loss(module.networks, state, condition).max().item())
    assert losses[0] == losses[1] == pytest.approx(0, abs=1e-10)
    assert losses[2] > 1e-3


def test_gradient_darkens_a_student_that_is_too_bright() -> None:
    module = aligned(alignment=TrajectoryAlignment(nfe=(1,)))
    module.student.bias.data -= 0.3  # x0 = noise - u is brighter by 0.3
    module.alignment.critic.offset.fill_(-0.3)
    state = module.alignment.roll_out(module.networks, torch.randn(64, 3, 4, 4), unguided(64))
    module.alignment.student_loss(module.networks, state, unguided(64)).mean().backward()
    assert module.student.bias.grad < 0  # a descent step raises the bias


def test_only_the_last_step_has_gradient() -> None:
    module = aligned(alignment=TrajectoryAlignment(nfe=(4,)))
    noise = torch.randn(8, 3, 4, 4)
    for seed in range(6):
        torch.manual_seed(seed)
        state = module.alignment.roll_out(module.networks, noise, unguided(8))
        (gradient,) = torch.autograd.grad(state.x_s.sum(), module.student.bias)
        # x_s = x - (t - r) (u + bias): a step of 1/4, and no dependence through earlier ones
        assert gradient.item() == pytest.approx(-0.25 * noise.numel())


def test_only_the_critic_trains_during_its_warmup() -> None:
    alignment = TrajectoryAlignment(critic_lr=1e-2, critic_warmup_steps=100)
    module = build(MeanFlow(GaussianAdapter(teacher="small"), validation=VALIDATION, alignment=alignment))
    before = [p.clone() for p in alignment.critic.parameters()]
    steps = alignment.losses(module.networks, torch.randn(8, 3, 4, 4), unguided(8), step=99)
    module.auxiliary.step(next(steps))
    with pytest.raises(StopIteration) as finished:
        next(steps)
    loss, logs = finished.value.value
    assert loss.tolist() == [0.0] * 8
    assert set(logs) == {"critic_loss"}
    assert any(not torch.equal(a, b) for a, b in zip(before, alignment.critic.parameters(), strict=True))


def test_alignment_takes_part_from_its_start_step_on() -> None:
    module = meanflow(alignment=TrajectoryAlignment(start_step=1))
    assert "critic_loss" not in module.evaluate_objective(torch.randn(8, 3, 4, 4), empty_captions(8)).logs
    module = meanflow(alignment=TrajectoryAlignment(start_step=0))
    assert "critic_loss" in module.evaluate_objective(torch.randn(8, 3, 4, 4), empty_captions(8)).logs


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"weight": 0.0}, "alignment.weight"),
        ({"nfe": ()}, "alignment.nfe"),
        ({"guidance_scale": -1.0}, "alignment.guidance_scale"),
        ({"critic_updates": 0}, "alignment.critic_updates"),
        ({"critic_lr": 0.0}, "alignment.critic_lr"),
        ({"start_step": -1}, "alignment.start_step"),
    ],
)
def test_error_for_invalid_settings_names_the_setting(settings: Any, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        TrajectoryAlignment(**settings)
