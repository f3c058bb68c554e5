from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.derivative import time_derivative
from lightning_distill.flow.losses import AdaptiveLoss, PowerLoss
from lightning_distill.flow.path import expand, interpolate
from lightning_distill.methods.alignment import TrajectoryAlignment, TrajectoryState
from lightning_distill.methods.guidance import Guidance
from lightning_distill.methods.meanflow import MeanFlow
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.methods.validation import ValidationOptions
from tests.gaussian import GaussianTeacher
from tests.methods.gaussian_adapter import GAUSSIAN, ExactTeacher, GaussianAdapter

VALIDATION = ValidationOptions(nfe=(1, 2), height=4, width=4, samples=8)


class Pictures(Dataset[dict[str, Any]]):
    """Gaussian pictures under the empty caption, so that the teacher is theirs."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = GAUSSIAN.mean + GAUSSIAN.std * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(i))
        return {"prompt": "", "image": image, "index": i}


def loader() -> DataLoader[dict[str, Any]]:
    return DataLoader(Pictures(), batch_size=8)


def method(student: str = "exact", **settings: Any) -> MeanFlow:
    module = MeanFlow(GaussianAdapter(student), validation=VALIDATION, **settings)
    module.setup("fit")
    module.configure_model()
    return module


def trainer(path: Path, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_steps": 4, "accelerator": "cpu", "logger": False, "log_every_n_steps": 1}
    defaults |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(default_root_dir=path, **(defaults | settings))


@pytest.fixture
def points() -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    t = torch.linspace(0.2, 1.0, 16)
    x_t = interpolate(GAUSSIAN.mean + GAUSSIAN.std * torch.randn(16, 3, 4, 4), torch.randn(16, 3, 4, 4), t)
    return x_t, 0.3 * t, t, {"caption": torch.zeros(16)}


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"solution": "discrete", "solver": "euler", "solver_steps": 256}, 1e-2),
        ({"solution": "discrete", "solver": "heun", "solver_steps": 64}, 1e-3),
        ({"solution": "discrete", "solver": "midpoint", "solver_steps": 64}, 1e-3),
        ({"solution": "bootstrapped", "solver": "euler", "bootstrap_step": 1e-3}, 1e-3),
        ({"solution": "bootstrapped", "solver": "heun", "bootstrap_step": 0.05}, 1e-3),
        ({"solution": "differential"}, 1e-4),
    ],
)
def test_every_target_is_the_exact_average_velocity_for_an_exact_student(settings, tolerance, points) -> None:
    x_t, r, t, condition = points
    _, target, _ = method(**settings).regression(x_t, r, t, GuidedCondition(condition, condition, torch.ones(16)))
    exact = GAUSSIAN.average_velocity(x_t, r, t)
    assert (target - exact).norm() / exact.norm() < tolerance


def test_discrete_target_holds_no_student(points) -> None:
    x_t, r, t, condition = points
    module = method(solution="discrete")
    _, before, _ = module.regression(x_t, r, t, GuidedCondition(condition, condition, torch.ones(16)))
    module.student.bias.data += 1
    _, after, _ = module.regression(x_t, r, t, GuidedCondition(condition, condition, torch.ones(16)))
    assert torch.equal(before, after)


@pytest.mark.parametrize("solution", ["discrete", "bootstrapped", "differential"])
def test_at_r_equal_t_every_solution_is_flow_matching_on_the_teacher(solution, points) -> None:
    x_t, _, t, condition = points
    _, target, _ = method("small", solution=solution).regression(
        x_t, t, t, GuidedCondition(condition, condition, torch.ones(16))
    )
    torch.testing.assert_close(target, GAUSSIAN.velocity(x_t, t))


def test_bootstrapped_residual_tends_to_the_differential_one(points) -> None:
    x_t, r, t, condition = (value.double() if isinstance(value, Tensor) else value for value in points)
    condition = {"caption": condition["caption"].double()}
    module = method("small", solution="differential")
    module.student.double()
    u = module.adapter.average_velocity(module.student, x_t, r, t, condition)
    _, target, _ = module.regression(x_t, r, t, GuidedCondition(condition, condition, torch.ones(16)))
    differential = u - target
    gaps = []
    for step in (1e-2, 1e-3):
        module.solution, module.bootstrap_step = "bootstrapped", step
        _, target, _ = module.regression(x_t, r, t, GuidedCondition(condition, condition, torch.ones(16)))
        bootstrapped = (u - target) * expand(t - r, u) / step
        gaps.append(((bootstrapped - differential).norm() / differential.norm()).item())
    assert gaps[1] < 0.15 * gaps[0]
    assert gaps[1] < 1e-2


def test_differential_target_is_the_identity_with_the_derivative_along_the_teacher(points) -> None:
    x_t, r, t, condition = points
    module = method("small", solution="differential")
    v = GAUSSIAN.velocity(x_t, t)
    _, dudt = time_derivative(lambda x, r, t: module.student(x, r, t, condition["caption"]), x_t, r, t, v)
    _, target, logs = module.regression(x_t, r, t, GuidedCondition(condition, condition, torch.ones(16)))
    torch.testing.assert_close(target, v - expand(t - r, x_t) * dudt)
    torch.testing.assert_close(logs["dudt_norm"], dudt.square().mean().sqrt())


@pytest.mark.parametrize(("source", "jumps", "tolerance"), [("student", 1, 1e-4), ("student", 3, 1e-4), ("teacher", 64, 0.05)])
def test_states_of_a_trajectory_are_on_the_teachers(source, jumps, tolerance) -> None:
    """Where jumps of an exact student lead, and steps of the teacher, if they are many."""
    module = method(trajectory_source=source, trajectory_steps=jumps, solver="heun")
    noise, t, condition = torch.randn(16, 3, 4, 4), torch.linspace(0, 1, 16), {"caption": torch.zeros(16)}
    for seed in range(4):
        torch.manual_seed(seed)
        x_t = module.roll_out(noise, t, GuidedCondition(condition, condition, torch.ones(16)))
        torch.testing.assert_close(x_t, GAUSSIAN.flow_map(noise, torch.ones(16), t), rtol=tolerance, atol=tolerance)


class Captions(LightningDataModule):
    """Of `Pictures`, without them."""

    has_images = False

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader([{"prompt": "", "index": i} for i in range(64)], batch_size=8)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self.train_dataloader()


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_prompts_alone_will_do(source, tmp_path) -> None:
    module = method(trajectory_fraction=1.0, trajectory_source=source, alignment=TrajectoryAlignment(weight=0.1))
    with torch.no_grad():
        module.student.bias.add_(1.0)
    run = trainer(tmp_path, max_steps=64, max_epochs=-1)
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.03)
    run.fit(module, datamodule=Captions())
    assert module.student.bias.abs() < 0.2
    assert run.callback_metrics["val/average_velocity_error"] < 0.1


def test_noised_pictures_need_pictures(tmp_path) -> None:
    module = MeanFlow(GaussianAdapter("small"), validation=VALIDATION, trajectory_fraction=0.9)
    with pytest.raises(ConfigurationError, match="Captions, which has no pictures"):
        trainer(tmp_path).fit(module, datamodule=Captions())
    assert not hasattr(module, "student")


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_a_share_of_the_training_states_is_the_students_own(fraction, monkeypatch) -> None:
    module = method("small", trajectory_fraction=fraction, trajectory_steps=1)
    seen = {}

    def regression(x_t, r, t, condition):
        seen.update(x_t=x_t.clone(), t=t)
        return torch.zeros_like(x_t), torch.zeros_like(x_t), {}

    monkeypatch.setattr(module, "regression", regression)
    monkeypatch.setattr(MeanFlow, "global_step", 0)
    x0 = torch.full((512, 3, 4, 4), 1e4)  # nothing that starts from noise gets there
    module.objective(x0, {"caption": torch.zeros(512)})
    from_data = seen["x_t"].flatten(1).mean(1) > 1e4 * (1 - seen["t"]) / 2
    assert 1 - from_data.float().mean() == pytest.approx(fraction, abs=0.1)


def test_a_small_batch_without_such_a_state_does_not_ask_the_network(monkeypatch) -> None:
    module = method("small", trajectory_fraction=0.5)
    monkeypatch.setattr(MeanFlow, "global_step", 0)
    asked = []
    monkeypatch.setattr(module, "roll_out", lambda noise, *_: asked.append(len(noise)) or noise)
    for seed in range(16):
        torch.manual_seed(seed)
        module.objective(torch.randn(1, 3, 4, 4), {"caption": torch.zeros(1)})
    assert set(asked) == {1}
    assert 0 < len(asked) < 16


def test_tangent_warmup_starts_at_the_teachers_velocity(points, tmp_path) -> None:
    x_t, r, t, condition = points
    module = method("small", solution="differential", tangent_warmup_steps=10)
    _, target, _ = module.regression(x_t, r, t, GuidedCondition(condition, condition, torch.ones(16)))
    torch.testing.assert_close(target, GAUSSIAN.velocity(x_t, t))
    trainer(tmp_path, max_steps=5, limit_val_batches=0).fit(module, loader())
    assert module.tangent_weight == 0.5


def test_guidance_moves_the_target_away_from_the_null_branch(points) -> None:
    x_t, _, t, _ = points
    condition, null = {"caption": torch.full((16,), 0.5)}, {"caption": torch.zeros(16)}
    _, target, _ = method(guidance=Guidance(scale=3.0)).regression(
        x_t, t, t, GuidedCondition(condition, null, torch.full((16,), 3.0))
    )
    torch.testing.assert_close(target, GAUSSIAN.velocity(x_t, t) + 1.5)


def test_guidance_interval_leaves_times_outside_alone(points) -> None:
    x_t, _, t, _ = points
    condition, null = {"caption": torch.full((16,), 0.5)}, {"caption": torch.zeros(16)}
    module = method(guidance=Guidance(scale=3.0, interval=(0.0, 0.5)))
    _, target, _ = module.regression(x_t, t, t, GuidedCondition(condition, null, torch.full((16,), 3.0)))
    guided = torch.where(expand(t <= 0.5, x_t), 1.5, 0.5)
    torch.testing.assert_close(target, GAUSSIAN.velocity(x_t, t) + guided)


def test_the_second_branch_of_guidance_is_computed_for_guided_rows_alone(points, monkeypatch) -> None:
    x_t, _, t, condition = points
    module = method(guidance=Guidance(scale=3.0, interval=(0.0, 0.5)))
    rows = []
    monkeypatch.setattr(GaussianTeacher, "velocity", lambda self, x, t: rows.append(len(x)) or torch.zeros_like(x))
    module.regression(x_t, t, t, GuidedCondition(condition, condition, torch.full((16,), 3.0)))
    assert rows == [16 + int((t <= 0.5).sum())]


def test_improved_guidance_mixes_the_student_in(points) -> None:
    x_t, _, t, _ = points
    condition, null = {"caption": torch.full((16,), 0.5)}, {"caption": torch.zeros(16)}
    module = method(guidance=Guidance(kind="improved", omega=1.0, kappa=0.5), caption_dropout=0.1)
    _, target, _ = module.regression(x_t, t, t, GuidedCondition(condition, null, torch.ones(16)))
    # v_T + 0.5 (u_c - u_null), and the exact student's captions add as the teacher's do
    torch.testing.assert_close(target, GAUSSIAN.velocity(x_t, t) + 0.75)
    # Its end is u = omega / (1 - kappa) (v_c - v_null) + v_null, which the student is compared with.
    reference = module.sampling_velocity(x_t, t, t, condition, null, "teacher")
    torch.testing.assert_close(reference, GAUSSIAN.velocity(x_t, t) + 1.0)


def test_improved_guidance_of_a_checkpoint_that_embeds_a_scale_ends_at_two_branches_of_that(points, monkeypatch) -> None:
    x_t, _, t, _ = points
    condition, null = {"caption": torch.full((16,), 0.5)}, {"caption": torch.zeros(16)}
    monkeypatch.setattr(GaussianAdapter, "check", lambda self: setattr(self, "embeds_guidance", True))
    monkeypatch.setattr(
        GaussianAdapter,
        "velocity",
        lambda self, network, x_t, t, condition, scale: network(x_t, None, t, scale * condition["caption"]),
    )
    module = method(guidance=Guidance(kind="improved", scale=3.0, omega=1.0, kappa=0.5), caption_dropout=0.1)
    reference = module.sampling_velocity(x_t, t, t, condition, null, "teacher")
    torch.testing.assert_close(reference, GAUSSIAN.velocity(x_t, t) + 2 * 3 * 0.5)


def test_improved_guidance_takes_its_scale_from_omega_and_kappa() -> None:
    with pytest.raises(ConfigurationError, match=r"guidance\.scale is 2.* comes to omega / \(1 - kappa\), which is 3"):
        method(guidance=Guidance(kind="improved", scale=2.0, omega=1.5, kappa=0.5), caption_dropout=0.1)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"solution": "exact"}, "model.solution"),
        ({"equal_fraction": 1.5}, "model.equal_fraction"),
        ({"solver": "rk4"}, "model.solver"),
        ({"solver_steps": 0}, "model.solver_steps"),
        ({"bootstrap_step": 0.0}, "model.bootstrap_step"),
        ({"trajectory_fraction": 1.1}, "model.trajectory_fraction"),
        ({"trajectory_steps": 0}, "model.trajectory_steps"),
        ({"trajectory_source": "data"}, "model.trajectory_source"),
        ({"tangent_warmup_steps": -1}, "model.tangent_warmup_steps"),
        ({"caption_dropout": 1.0}, "model.caption_dropout"),
        ({"ema_decay": 1.0}, "model.ema_decay"),
        ({"guidance": Guidance(kind="improved")}, "caption_dropout"),
        ({"guidance": Guidance(kind="improved"), "caption_dropout": 0.1, "equal_fraction": 0.0}, "equal_fraction"),
        ({"guidance": Guidance(kind="embedded")}, "guidance.kind"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings, names) -> None:
    with pytest.raises(ConfigurationError, match=names):
        method(**settings)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"scale": -1.0}, "guidance.scale"),
        ({"scales": [4.0, 5.0]}, "guidance.scales"),
        ({"kind": "embedded", "scales": []}, "guidance.scales"),
        ({"kind": "embedded", "scales": [4.0, 5.0]}, "guidance.scale, at which validation draws, 1"),
        ({"interval": (0.5, 0.5)}, "guidance.interval"),
        ({"kind": "embedded", "interval": (0.0, 0.5)}, "guidance.interval"),
        ({"kind": "improved", "kappa": 1.0}, "guidance.kappa"),
        ({"kind": "improved", "kappa": -1.0}, "guidance.kappa"),
    ],
)
def test_guidance_settings_that_contradict_each_other_are_refused(settings, names) -> None:
    with pytest.raises(ConfigurationError, match=names):
        Guidance(**settings)


def test_two_branch_guidance_asks_only_rows_that_are_guided(points, monkeypatch) -> None:
    x_t, _, t, condition = points
    rows = []
    monkeypatch.setattr(GaussianTeacher, "velocity", lambda self, x, t: rows.append(len(x)) or torch.zeros_like(x))
    scale = torch.where(t > 0.5, 3.0, 1.0)
    module = method()
    module.adapter.guided_velocity(module.teacher, x_t, t, condition, condition, scale)
    assert rows == [16 + int((t > 0.5).sum())]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"nfe": ()}, "validation.nfe"),
        ({"teacher_nfe": 0}, "validation.teacher_nfe"),
        ({"samples": 0}, "validation.samples"),
        ({"intervals": [(0.5, 0.5)]}, "validation.intervals"),
        ({"intervals": [(0.5, 1.5)]}, "validation.intervals"),
    ],
)
def test_measures_that_cannot_be_taken_are_refused_by_name(settings, names) -> None:
    with pytest.raises(ConfigurationError, match=names):
        ValidationOptions(**settings)


def test_embedded_guidance_draws_among_its_scales() -> None:
    drawn = Guidance(kind="embedded", scale=4.5, scales=[4.0, 4.5, 5.0]).draw(200, torch.device("cpu"))
    assert set(drawn.tolist()) == {4.0, 4.5, 5.0}


@pytest.mark.parametrize("loss", [PowerLoss(1.0), PowerLoss(2.0), AdaptiveLoss(0.5), AdaptiveLoss(1.0)])
@pytest.mark.parametrize("solution", ["discrete", "bootstrapped", "differential"])
def test_training_corrects_a_student_that_is_off(solution, loss, tmp_path) -> None:
    module = method(solution=solution, loss=loss, solver_steps=8, optimizer=lambda p: torch.optim.Adam(p, lr=0.05))
    module.student.bias.data += 0.5
    trainer(tmp_path, max_steps=40).fit(module, loader(), loader())
    assert module.student.bias.abs() < 0.25


def test_an_exact_student_has_no_average_velocity_error(tmp_path) -> None:
    module = method()
    run = trainer(tmp_path)
    (exact,) = run.validate(module, loader(), verbose=False)
    module.student.bias.data += 1
    (wrong,) = run.validate(module, loader(), verbose=False)
    assert exact["val/average_velocity_error"] < 1e-3
    assert wrong["val/average_velocity_error"] > 0.3


def test_the_empty_prompt_is_encoded_once_and_fit_for_training(monkeypatch) -> None:
    module = method()
    asked = []
    monkeypatch.setattr(module, "encode_prompt", lambda prompts: asked.append(prompts) or {"caption": torch.ones(1)})
    with torch.inference_mode():
        module.null_condition(2)
    null = module.null_condition(3)["caption"]
    assert asked == [[""]]
    assert null.shape == (3,)
    assert not null.is_inference()
    module.train_text_encoders = True
    module.null_condition(3)
    assert len(asked) == 2


def test_accumulated_gradients_equal_a_larger_batch(tmp_path) -> None:
    biases = []
    for size, accumulate in ((8, 1), (4, 2)):
        module = method(equal_fraction=1.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        module.student.bias.data += 0.5
        data = DataLoader(Pictures(), batch_size=size)
        trainer(tmp_path, max_steps=3, accumulate_grad_batches=accumulate, limit_val_batches=0).fit(module, data)
        biases.append(module.student.bias.item())
    # At r = t the target is the teacher's velocity wherever it is asked, so noise does not matter.
    assert biases[0] == pytest.approx(biases[1], abs=1e-6)
    assert biases[0] < 0.5


def test_gradients_are_clipped(tmp_path) -> None:
    module = method(equal_fraction=1.0, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    module.student.bias.data += 0.5
    trainer(tmp_path, max_steps=1, gradient_clip_val=0.01, limit_val_batches=0).fit(module, loader())
    assert module.student.bias.item() == pytest.approx(0.49, abs=1e-6)


@pytest.mark.parametrize("solution", ["discrete", "bootstrapped", "differential"])
def test_mixed_precision_trains(solution, tmp_path) -> None:
    module = method("small", solution=solution)
    before = [p.clone() for p in module.student.parameters()]
    trainer(tmp_path, precision="bf16-mixed", limit_val_batches=0).fit(module, loader())
    after = list(module.student.parameters())
    assert all(torch.isfinite(p).all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_average_follows_the_student_and_is_what_is_sampled(tmp_path) -> None:
    module = method(ema_decay=0.5, equal_fraction=1.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    module.student.bias.data += 0.5
    history = []
    module.on_before_zero_grad = lambda optimizer: history.append(module.student.bias.item())
    trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(module, loader())
    history.append(module.student.bias.item())
    average = history[1]  # the first update copies
    for value in history[2:]:
        average = 0.5 * average + 0.5 * value
    assert module.sampling_student.bias.item() == pytest.approx(average, abs=1e-6)


def test_checkpoints_leave_the_teacher_out_and_keep_the_phase(tmp_path) -> None:
    module = method("small", solution="bootstrapped", ema_decay=0.9)
    run = trainer(tmp_path)
    run.fit(module, loader(), loader())
    module.solution = "differential"
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"student", "ema"}

    again = method("small", solution="bootstrapped", ema_decay=0.9, tangent_warmup_steps=8)
    resumed = trainer(tmp_path, max_steps=6)
    resumed.fit(again, loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert again.solution == "differential"
    assert again.tangent_weight == pytest.approx((6 - 4) / 8)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path) -> None:
    module = method("small")
    run = trainer(tmp_path)
    run.fit(module, loader(), loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ConfigurationError, match="model settings"):
        trainer(tmp_path).fit(method("small", ema_decay=0.9), loader(), loader(), ckpt_path=tmp_path / "last.ckpt")


def test_pictures_depend_on_their_own_seed_alone() -> None:
    module = method()
    together = module.sample(["a", "b", "c"], nfe=2, seeds=[5, 6, 7])
    alone = module.sample(["b"], nfe=2, seeds=[6], batch_size=1)
    torch.testing.assert_close(together[1:2], alone)
    assert not torch.equal(together[0], together[1])


def test_one_step_of_an_exact_student_is_the_teachers_flow_map() -> None:
    module = method()
    noise = torch.randn(4, 3, 4, 4)
    x0 = module.sample_latents(noise, {"caption": torch.zeros(4)}, 1, "student")
    torch.testing.assert_close(x0, GaussianTeacher().flow_map(noise, torch.ones(4), torch.zeros(4)))


def aligned(**settings: Any) -> MeanFlow:
    """A method whose critic is the exact velocity for every s, plus an offset."""
    module = method(**settings)
    assert module.alignment is not None
    module.alignment.critic = ExactTeacher()
    return module


class TestAlignment:
    def test_trains_the_critic_and_the_student_but_not_the_teacher(self, tmp_path) -> None:
        module = MeanFlow(
            GaussianAdapter("small", teacher="small"), validation=VALIDATION, alignment=TrajectoryAlignment(critic_lr=1e-2)
        )
        module.setup("fit")
        module.configure_model()
        networks = {"teacher": module.teacher, "student": module.student, "critic": module.alignment.critic}
        before = {name: [p.clone() for p in network.parameters()] for name, network in networks.items()}
        trainer(tmp_path, limit_val_batches=0).fit(module, loader())
        moved = {
            name: any(not torch.equal(a, b) for a, b in zip(before[name], network.parameters(), strict=True))
            for name, network in networks.items()
        }
        assert moved == {"teacher": False, "student": True, "critic": True}

    def test_exact_critic_minimises_its_loss_at_every_grid_time(self) -> None:
        """States on the flow at s are diffused on to the very marginals of the path, whose velocity is the teacher's."""
        module = aligned(alignment=TrajectoryAlignment())
        critic = module.alignment.critic
        noise, condition = torch.randn(4096, 3, 4, 4), {"caption": torch.zeros(4096)}
        for s in (0.0, 0.25, 0.5):
            times = torch.full((4096,), s)
            x_s = GAUSSIAN.flow_map(noise, torch.ones(4096), times)
            losses = []
            for offset in (-0.1, 0.0, 0.1):
                torch.manual_seed(1)
                critic.offset.fill_(offset)
                state = TrajectoryState(x_s, times)
                losses.append(
                    module.alignment.critic_loss(module, state, GuidedCondition(condition, condition, torch.ones(4096))).item()
                )
            slope = (losses[2] - losses[0]) / 0.2
            curvature = (losses[2] - 2 * losses[1] + losses[0]) / 0.01
            assert abs(slope / curvature) < 0.01

    def test_critic_loss_is_of_one_size_along_the_trajectory(self) -> None:
        module = aligned(alignment=TrajectoryAlignment())
        noise, condition = torch.randn(2048, 3, 4, 4), {"caption": torch.zeros(2048)}
        losses = []
        for s in (0.0, 0.5, 0.9):
            times = torch.full((2048,), s)
            state = TrajectoryState(GAUSSIAN.flow_map(noise, torch.ones(2048), times), times)
            losses.append(
                module.alignment.critic_loss(module, state, GuidedCondition(condition, condition, torch.ones(2048))).item()
            )
        assert max(losses) < 3 * min(losses)

    def test_a_student_that_follows_the_teacher_feels_nothing(self) -> None:
        module = aligned(alignment=TrajectoryAlignment())
        noise, condition = torch.randn(64, 3, 4, 4), {"caption": torch.zeros(64)}
        state = module.alignment.roll_out(module, noise, GuidedCondition(condition, condition, torch.ones(64)))
        loss = module.alignment.student_loss(module, state, GuidedCondition(condition, condition, torch.ones(64)))
        assert loss.max() < 1e-10

    def test_critic_is_told_the_grid_time_of_the_states(self) -> None:
        """Else one score would have to serve states of different distributions."""
        asked = []

        class Critic(ExactTeacher):
            def forward(self, x, r, t, caption):
                asked.append((r, t))
                return super().forward(x, r, t, caption)

        module = method(alignment=TrajectoryAlignment())
        module.alignment.critic = Critic()
        condition, s = {"caption": torch.zeros(8)}, torch.full((8,), 0.5)
        state = TrajectoryState(torch.randn(8, 3, 4, 4), s)
        module.alignment.critic_loss(module, state, GuidedCondition(condition, condition, torch.ones(8)))
        module.alignment.student_loss(module, state, GuidedCondition(condition, condition, torch.ones(8)))
        assert len(asked) == 2
        assert all(torch.equal(r, s) and (t > s).all() and (t < 1).all() for r, t in asked)

    def test_its_teacher_may_be_guided_more(self) -> None:
        """A student that has learned guidance 2 is pulled on by captions, by as much as guidance 3 adds."""
        condition, null = {"caption": torch.full((64,), 0.5)}, {"caption": torch.zeros(64)}
        losses = []
        for guidance_scale in (None, 2.0, 3.0):
            module = aligned(guidance=Guidance(scale=2.0), alignment=TrajectoryAlignment(guidance_scale=guidance_scale))
            module.alignment.critic.offset.fill_(0.5)  # of the captions, which add to the velocity once more under guidance 2
            state = TrajectoryState(torch.randn(64, 3, 4, 4), torch.zeros(64))
            torch.manual_seed(0)
            loss = module.alignment.student_loss(module, state, GuidedCondition(condition, null, torch.full((64,), 2.0)))
            losses.append(loss.max().item())
        assert losses[0] == losses[1] == pytest.approx(0, abs=1e-10)
        assert losses[2] > 1e-3

    def test_gradient_points_to_the_teacher(self) -> None:
        """A student that is too bright has a critic that is too bright, and is pulled back."""
        module = aligned(alignment=TrajectoryAlignment(nfe=(1,)))
        module.student.bias.data -= 0.3  # x0 = noise - u is brighter by 0.3
        module.alignment.critic.offset.fill_(-0.3)
        noise, condition = torch.randn(64, 3, 4, 4), {"caption": torch.zeros(64)}
        state = module.alignment.roll_out(module, noise, GuidedCondition(condition, condition, torch.ones(64)))
        module.alignment.student_loss(module, state, GuidedCondition(condition, condition, torch.ones(64))).mean().backward()
        assert module.student.bias.grad < 0  # a descent step raises the bias

    def test_only_the_last_segment_carries_gradient(self) -> None:
        module = aligned(alignment=TrajectoryAlignment(nfe=(4,)))
        noise, condition = torch.randn(8, 3, 4, 4), {"caption": torch.zeros(8)}
        for seed in range(6):
            torch.manual_seed(seed)
            state = module.alignment.roll_out(module, noise, GuidedCondition(condition, condition, torch.ones(8)))
            (gradient,) = torch.autograd.grad(state.x_s.sum(), module.student.bias)
            # x_s = x - (t - r) (u + bias): a segment of 1/4 and no dependence through earlier ones
            assert gradient.item() == pytest.approx(-0.25 * noise.numel())

    def test_warm_up_trains_the_critic_alone(self, tmp_path) -> None:
        alignment = TrajectoryAlignment(critic_lr=1e-2, critic_warmup_steps=100)
        module = MeanFlow(GaussianAdapter(teacher="small"), validation=VALIDATION, alignment=alignment)
        module.setup("fit")
        module.configure_model()
        module.trainer = trainer(tmp_path)
        before = [p.clone() for p in alignment.critic.parameters()]
        null = {"caption": torch.zeros(8)}
        loss, logs = alignment(module, torch.randn(8, 3, 4, 4), GuidedCondition(null, null, torch.ones(8)))
        assert loss.tolist() == [0.0] * 8
        assert set(logs) == {"critic_loss"}
        assert any(not torch.equal(a, b) for a, b in zip(before, alignment.critic.parameters(), strict=True))

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
    def test_settings_out_of_range_are_refused(self, settings, names) -> None:
        with pytest.raises(ConfigurationError, match=names):
            TrajectoryAlignment(**settings)
