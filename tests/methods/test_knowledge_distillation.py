from typing import Any

import pytest
import torch

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods import Guidance, KnowledgeDistillation
from tests.methods.gaussian_adapter import GAUSSIAN, GaussianAdapter
from tests.methods.gaussian_runs import VALIDATION, Captions, build, empty_captions, trainer, unguided


def method(student: str = "exact", **settings: Any) -> Any:
    return build(KnowledgeDistillation(GaussianAdapter(student), validation=VALIDATION, **settings))


@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_segment_ends_are_states_of_the_teacher_trajectory(nfe: int) -> None:
    module, noise, segment = method(solver_steps=32), torch.randn(16, 3, 4, 4), torch.arange(16) % nfe
    grid = module.adapter.time_grid(nfe, (3, 4, 4))
    start, end = module.teacher_segment(noise, grid, segment, unguided(16))
    ones = torch.ones(16)
    torch.testing.assert_close(start, GAUSSIAN.flow_map(noise, ones, grid[segment]), rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(end, GAUSSIAN.flow_map(noise, ones, grid[segment + 1]), rtol=5e-3, atol=5e-3)
    assert torch.equal(start[segment == 0], noise[segment == 0])


def test_teacher_integrates_no_sample_beyond_its_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch_sizes = method(), []
    monkeypatch.setattr(module.networks, "integrate_teacher", lambda x, *_: batch_sizes.append(len(x)) or x)
    grid = module.adapter.time_grid(4, (3, 4, 4))
    module.teacher_segment(torch.randn(5, 3, 4, 4), grid, torch.tensor([0, 2, 1, 0, 2]), unguided(5))
    assert batch_sizes == [5, 3, 2]


def test_batches_sample_all_grids_and_segments() -> None:
    module, times = method(nfe=(1, 3)), set()
    for seed in range(8):
        torch.manual_seed(seed)
        times |= set(module.objective(torch.zeros(16, 3, 4, 4), empty_captions(16)).t.tolist())
    assert sorted(times) == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_exact_student_has_almost_no_loss() -> None:
    losses = []
    for bias in (0.0, 0.5):
        module = method(solver_steps=32)
        module.student.bias.data += bias
        torch.manual_seed(0)
        losses.append(module.objective(torch.zeros(16, 3, 4, 4), empty_captions(16)).loss.mean().item())
    assert losses[0] < 1e-4 * losses[1]


def test_training_on_prompts_halves_the_average_velocity_error(tmp_path: Any) -> None:
    module = method("small", optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    assert not module.needs_images
    (before,) = trainer(tmp_path).validate(module, datamodule=Captions(), verbose=False)
    trainer(tmp_path, max_steps=160, max_epochs=-1, limit_val_batches=0).fit(module, datamodule=Captions())
    (after,) = trainer(tmp_path).validate(module, datamodule=Captions(), verbose=False)
    assert after["val/average_velocity_error"] < 0.5 * before["val/average_velocity_error"]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"nfe": ()}, r"model\.nfe is \[\]"),
        ({"nfe": (2, 0)}, r"model\.nfe is \[2, 0\]"),
        ({"solver": "rk4"}, r"model\.solver is"),
        ({"solver_steps": 0}, r"model\.solver_steps"),
        ({"guidance": Guidance("improved"), "caption_dropout": 0.1}, r"guidance\.kind is improved.* KnowledgeDistillation"),
    ],
)
def test_error_for_invalid_settings_names_the_setting(settings: Any, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        KnowledgeDistillation(GaussianAdapter(), validation=VALIDATION, **settings)
