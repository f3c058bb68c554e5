"""Training of auxiliary networks beside the student: resumed runs, precision and non-finite gradients."""

from pathlib import Path

import pytest
import torch

from lightning_distill.errors import ConfigurationError, NonFiniteError
from lightning_distill.methods import DMD2, IMM, LADD, KnowledgeDistillation, MeanFlow, TeacherStudentBase, TrajectoryAlignment
from lightning_distill.methods.discriminator import Discriminator
from tests.methods.gaussian_adapter import GaussianAdapter
from tests.methods.gaussian_runs import VALIDATION, loader, trainer


def aligned(alignment: TrajectoryAlignment | None) -> MeanFlow:
    return MeanFlow(GaussianAdapter("small", teacher="small"), validation=VALIDATION, alignment=alignment)


def resume(module: TeacherStudentBase, path: Path) -> None:
    """Resume a run of two steps with a critic by a method with other settings, for two more steps."""
    first = aligned(TrajectoryAlignment(critic_lr=1e-2))
    run = trainer(path, max_steps=2, limit_val_batches=0)
    run.fit(first, loader())
    run.save_checkpoint(path / "last.ckpt")
    trainer(path, max_steps=4, limit_val_batches=0).fit(module, loader(), ckpt_path=path / "last.ckpt")


def test_resumed_run_uses_a_changed_critic_lr(tmp_path: Path) -> None:
    module = aligned(TrajectoryAlignment(critic_lr=1e-5))
    with pytest.warns(UserWarning, match=r"alignment\.critic lr 0\.01 -> 1e-05"):
        resume(module, tmp_path)
    (auxiliary,) = module.auxiliary_optimizers().values()
    assert [group["lr"] for group in auxiliary.optimizer.param_groups] == [1e-5]
    assert all(state["step"] == 4 for state in auxiliary.optimizer.state_dict()["state"].values())


def test_run_resumes_without_its_alignment(tmp_path: Path) -> None:
    module = aligned(None)
    resume(module, tmp_path)
    assert module.trainer.global_step == 4


def test_gradient_scaler_with_auxiliary_networks_is_an_error(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(ConfigurationError, match=r"trainer\.precision is 16-mixed.* alignment\.critic"):
        run.fit(aligned(TrajectoryAlignment()), loader())


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_in_16_bits_are_an_error(precision: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.strategy.precision_plugin.precision = precision
    with pytest.raises(ConfigurationError, match=rf"trainer\.precision is {precision}.* bf16-mixed"):
        run.fit(aligned(None), loader())


def test_non_finite_critic_gradients_stop_the_run_during_the_warmup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alignment = TrajectoryAlignment(critic_warmup_steps=100)
    monkeypatch.setattr(
        alignment, "critic_loss", lambda *args: sum(p.square().sum() for p in alignment.critic.parameters()) * torch.nan
    )
    with pytest.raises(NonFiniteError, match="gradients of the critic are not finite"):
        trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(aligned(alignment), loader())
    assert all(torch.isfinite(parameter).all() for parameter in alignment.critic.parameters())


def test_heads_have_equal_weights_in_all_processes_and_leave_generators_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(1)
    state, seeds[:] = torch.get_rng_state(), []
    discriminator = Discriminator([4])
    assert torch.equal(torch.get_rng_state(), state)
    assert seeds == []
    torch.manual_seed(2)
    for parameter, other in zip(discriminator.parameters(), Discriminator([4]).parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_images_are_encoded_only_if_the_objective_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    monkeypatch.setattr(GaussianAdapter, "encode_images", lambda self, images: encoded.append(len(images)) or images)
    for method, reads_images in ((KnowledgeDistillation, False), (DMD2, False), (LADD, False), (IMM, True)):
        encoded.clear()
        module = method(GaussianAdapter("small", teacher="small"), validation=VALIDATION)
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, loader())
        assert bool(encoded) is reads_images, method
