"""What trains beside the student: settings of a resumed run, and precision."""

from pathlib import Path

import pytest
import torch

from lightning_distill.errors import ConfigurationError, NonFiniteError
from lightning_distill.methods import DMD2, IMM, LADD, SCM, KnowledgeDistillation, TeacherStudentBase
from lightning_distill.methods.alignment import TrajectoryAlignment
from lightning_distill.methods.discriminator import Discriminator
from lightning_distill.methods.meanflow import MeanFlow
from lightning_distill.methods.validation import ValidationOptions
from tests.methods.gaussian_adapter import GaussianAdapter
from tests.methods.test_meanflow import VALIDATION, loader, trainer


def aligned(alignment: TrajectoryAlignment | None) -> MeanFlow:
    return MeanFlow(GaussianAdapter("small", teacher="small"), validation=VALIDATION, alignment=alignment)


def resumed(module: TeacherStudentBase, path: Path) -> None:
    first = aligned(TrajectoryAlignment(critic_lr=1e-2))
    run = trainer(path, max_steps=2, limit_val_batches=0)
    run.fit(first, loader())
    run.save_checkpoint(path / "last.ckpt")
    trainer(path, max_steps=4, limit_val_batches=0).fit(module, loader(), ckpt_path=path / "last.ckpt")


def test_a_changed_rate_of_the_critic_counts_after_a_resume(tmp_path: Path) -> None:
    module = aligned(TrajectoryAlignment(critic_lr=1e-5))
    with pytest.warns(UserWarning, match=r"alignment\.critic lr 0\.01 -> 1e-05"):
        resumed(module, tmp_path)
    (side,) = module.auxiliary_optimizers(spread=False).values()
    assert [group["lr"] for group in side.optimizer.param_groups] == [1e-5]
    assert all(state["step"] == 4 for state in side.optimizer.state_dict()["state"].values())


def test_a_run_goes_on_without_its_alignment(tmp_path: Path) -> None:
    module = aligned(None)
    resumed(module, tmp_path)
    assert module.trainer.global_step == 4


def test_scaled_losses_are_refused_where_networks_have_losses_of_their_own(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(ConfigurationError, match=r"trainer\.precision is 16-mixed.* alignment\.critic"):
        run.fit(aligned(TrajectoryAlignment()), loader())


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_in_16_bits_are_refused(precision: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.strategy.precision_plugin.precision = precision
    with pytest.raises(ConfigurationError, match=rf"trainer\.precision is {precision}.* bf16-mixed"):
        run.fit(aligned(None), loader())


def test_a_critic_that_breaks_down_before_the_student_feels_it_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alignment = TrajectoryAlignment(critic_warmup_steps=100)
    monkeypatch.setattr(
        alignment, "critic_loss", lambda *args: sum(p.square().sum() for p in alignment.critic.parameters()) * torch.nan
    )
    with pytest.raises(NonFiniteError, match="critic or discriminator are not finite"):
        trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(aligned(alignment), loader())
    assert all(torch.isfinite(parameter).all() for parameter in alignment.critic.parameters())


def test_heads_are_the_same_in_all_processes_and_leave_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(1)
    state, seeds[:] = torch.get_rng_state(), []
    one = Discriminator([4])
    assert torch.equal(torch.get_rng_state(), state)
    assert seeds == []
    torch.manual_seed(2)
    for parameter, other in zip(one.parameters(), Discriminator([4]).parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_pictures_that_nothing_looks_at_are_not_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    monkeypatch.setattr(GaussianAdapter, "encode_images", lambda self, images: encoded.append(len(images)) or images)
    for method, looks in ((KnowledgeDistillation, False), (DMD2, False), (LADD, False), (IMM, True)):
        encoded.clear()
        module = method(GaussianAdapter("small", teacher="small"), validation=VALIDATION)
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, loader())
        assert bool(encoded) is looks, method


def test_intervals_that_a_student_is_not_asked_for_are_refused() -> None:
    options = ValidationOptions(nfe=(1,), height=4, width=4, intervals=[(0.5, 1.0)])
    with pytest.raises(ConfigurationError, match=r"validation\.intervals has none that ends at 0, where SCM"):
        SCM(GaussianAdapter("small"), validation=options).setup("fit")
