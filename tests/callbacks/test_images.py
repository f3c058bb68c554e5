"""Layout of the image grid, its samples, and its logging to TensorBoard."""

import io
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_distill.callbacks.images import TAG, LogImages, image_grid
from lightning_distill.data import ShapesData
from lightning_distill.errors import ConfigurationError
from tests.callbacks.distillation import PixelDistillation, PixelTraining
from tests.toy import ToyModule

PROMPTS = ["a red circle", "two crosses", "a blue triangle and a yellow square"]


def fit(directory, module, callback, *, logger=True, epochs=2, **kwargs):
    logger = TensorBoardLogger(directory, name=None, version="", default_hp_metric=False) if logger is True else logger
    trainer = Trainer(
        default_root_dir=directory,
        accelerator="cpu",
        max_epochs=epochs,
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **kwargs,
    )
    trainer.fit(module, ShapesData(size=8, batch_size=8, prompts_per_category=2))
    return trainer


def logged_grids(directory):
    events = EventAccumulator(str(directory))
    events.Reload()
    if TAG not in events.Tags()["images"]:
        return []
    return [np.asarray(Image.open(io.BytesIO(event.encoded_image_string))) for event in events.Images(TAG)]


def cells(grid, rows, columns, side=96):
    """Images (rows, columns, side, side, 3) of a grid, counted from its lower right corner."""
    step = side + 4
    top, left = grid.shape[0] - rows * step, grid.shape[1] - columns * step
    return np.stack([[grid[top + i * step :, left + j * step :][:side, :side] for j in range(columns)] for i in range(rows)])


def test_grid_places_every_image():
    images = torch.rand(2, 3, 3, 32, 32).mul(255).round().div(255)
    grid = np.asarray(image_grid({"1 step": images[0], "teacher, 32 steps": images[1]}, PROMPTS))
    found = cells(grid, 2, 3)
    expected = images.mul(255).round().byte().permute(0, 1, 3, 4, 2).numpy().repeat(3, axis=2).repeat(3, axis=3)
    np.testing.assert_array_equal(found, expected)


def test_grid_labels_fit_into_its_margins():
    images = torch.full((3, 3, 32, 32), 0.5)
    grid = np.asarray(image_grid({"1 step": images, "2 steps": images}, PROMPTS))
    height, width = grid.shape[:2]
    top, left = height - 2 * 100, width - 3 * 100
    ink = (grid < 100).all(-1)
    for j in range(3):  # a caption above each column
        assert ink[:top, left + j * 100 :][:, :100].any()
    assert ink[:top, left + 200 :].sum() > ink[:top, left : left + 100].sum()  # the longest caption has the most ink
    for i in range(2):
        assert ink[top + i * 100 :][:96, :left].any()
    border = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
    assert not border.any(), "a label is cut off"


@pytest.mark.parametrize(("side", "shown"), [(8, 96), (32, 96), (40, 120), (96, 96), (200, 200), (512, 256)])
def test_grid_scales_images_of_all_sizes(side, shown):
    grid = np.asarray(image_grid({"1 step": torch.full((1, 3, side, side), 0.5)}, [""]))
    grey = (grid == 128).all(-1)
    assert (grey.any(0).sum(), grey.any(1).sum()) == (shown, shown)


def test_grid_preserves_the_aspect_ratio():
    grid = np.asarray(image_grid({"1 step": torch.full((1, 3, 16, 32), 0.5)}, [""]))
    grey = (grid == 128).all(-1)
    assert (grey.any(0).sum(), grey.any(1).sum()) == (96, 48)


def test_student_and_teacher_in_tensorboard(tmp_path):
    module = PixelDistillation(strength=0.0, optimizer=partial(torch.optim.SGD, lr=0.5))
    fit(tmp_path, module, LogImages(PROMPTS))
    grids = logged_grids(tmp_path)
    assert len(grids) == 2  # one per validation, none for the sanity check
    for grid in grids:
        one, two, teacher = cells(grid, 3, 3)
        truth = module.adapter.encode_prompt(PROMPTS)["image"].div(2).add(0.5).mul(255).round().byte()
        truth = truth.permute(0, 2, 3, 1).numpy().repeat(3, axis=1).repeat(3, axis=2)
        assert np.abs(teacher.astype(int) - truth).max() <= 1
        assert not np.array_equal(one, teacher)
        assert not np.array_equal(two, teacher)
    assert not np.array_equal(cells(grids[0], 3, 3)[0], cells(grids[1], 3, 3)[0])  # the student has trained


def test_teacher_is_sampled_once(tmp_path, monkeypatch):
    calls = []
    sample = PixelDistillation.sample

    def counted(self, prompts, nfe, seeds=None, network="student", **kwargs):
        calls.append((network, nfe, tuple(seeds)))
        return sample(self, prompts, nfe, seeds, network, **kwargs)

    monkeypatch.setattr(PixelDistillation, "sample", counted)
    fit(tmp_path, PixelDistillation(with_metric=False), LogImages(PROMPTS, seed=5), epochs=3)
    student = [("student", 1, (5, 6, 7)), ("student", 2, (5, 6, 7))]
    assert calls == [*student, ("teacher", 4, (5, 6, 7)), *student, *student]


def test_default_prompts_are_the_first_unique_ones_of_the_validation_set(tmp_path):
    callback = LogImages(columns=5)
    trainer = fit(tmp_path, PixelDistillation(), callback, epochs=1)
    validated = [prompt for batch in trainer.val_dataloaders for prompt in batch["prompt"]]
    assert callback.prompts == list(dict.fromkeys(validated))[:5]
    assert len(set(callback.prompts)) == 5
    fit(tmp_path, PixelDistillation(), wide := LogImages(columns=100), epochs=1)
    assert wide.prompts == list(dict.fromkeys(validated[:8]))  # the first batch


def test_method_without_teacher_has_no_teacher_row(tmp_path):
    fit(tmp_path / "with", PixelDistillation(), LogImages(PROMPTS), epochs=1)
    fit(tmp_path / "without", PixelTraining(), LogImages(PROMPTS), epochs=1)
    (with_teacher,), (without,) = logged_grids(tmp_path / "with"), logged_grids(tmp_path / "without")
    assert with_teacher.shape[0] - without.shape[0] == 100
    assert cells(without, 2, 3).std() > 0


@pytest.mark.parametrize("logger", [False, "csv"])
def test_no_sampling_without_tensorboard(tmp_path, monkeypatch, logger):
    monkeypatch.setattr(PixelDistillation, "sample", lambda *args, **kwargs: pytest.fail("sampled without TensorBoard"))
    logger = CSVLogger(tmp_path) if logger == "csv" else False
    trainer = fit(tmp_path, PixelDistillation(with_metric=False), LogImages(), logger=logger)
    assert trainer.global_step == 2


def test_every_n_validations_across_a_resume(tmp_path):
    callback = LogImages(PROMPTS, every_n_validations=2)
    fit(tmp_path / "first", PixelDistillation(), callback, epochs=3)
    assert len(logged_grids(tmp_path / "first")) == 2  # validations 1 and 3
    resumed = LogImages(every_n_validations=2)
    resumed.load_state_dict(callback.state_dict())
    assert resumed.prompts == PROMPTS
    fewer = LogImages(columns=1)
    fewer.load_state_dict(callback.state_dict())
    assert fewer.prompts is None
    fit(tmp_path / "second", PixelDistillation(), resumed, epochs=2)  # validations 4 and 5
    assert len(logged_grids(tmp_path / "second")) == 1


def test_training_mode_is_restored(tmp_path):
    module = PixelDistillation()
    fit(tmp_path, module, LogImages(PROMPTS))
    assert module.student.training
    assert module.student.strength.requires_grad


@pytest.mark.parametrize("settings", [{"prompts": []}, {"columns": 0}, {"every_n_validations": 0}])
def test_invalid_settings(settings):
    with pytest.raises(ConfigurationError, match="LogImages"):
        LogImages(**settings)


def test_module_that_samples_no_images():
    with pytest.raises(ConfigurationError, match="LogImages needs a method that samples images, but ToyModule samples none"):
        LogImages().setup(None, ToyModule(), "fit")
