"""The grid shows the right pictures under the right labels, and reaches TensorBoard."""

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
from tests.callbacks.distillation import PictureDistillation, PictureTraining, Scripted

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
    """Pictures (rows, columns, side, side, 3) of a grid, from its lower right corner."""
    step = side + 4
    top, left = grid.shape[0] - rows * step, grid.shape[1] - columns * step
    return np.stack([[grid[top + i * step :, left + j * step :][:side, :side] for j in range(columns)] for i in range(rows)])


def test_grid_places_every_picture():
    images = torch.rand(2, 3, 3, 32, 32).mul(255).round().div(255)
    grid = np.asarray(image_grid({"1 step": images[0], "teacher, 32 steps": images[1]}, PROMPTS))
    found = cells(grid, 2, 3)
    expected = images.mul(255).round().byte().permute(0, 1, 3, 4, 2).numpy().repeat(3, axis=2).repeat(3, axis=3)
    np.testing.assert_array_equal(found, expected)


def test_grid_is_labeled_inside_its_margins():
    images = torch.full((3, 3, 32, 32), 0.5)
    grid = np.asarray(image_grid({"1 step": images, "2 steps": images}, PROMPTS))
    height, width = grid.shape[:2]
    top, left = height - 2 * 100, width - 3 * 100
    ink = (grid < 100).all(-1)
    for j in range(3):  # a caption over each column
        assert ink[:top, left + j * 100 :][:, :100].any()
    assert ink[:top, left + 200 :].sum() > ink[:top, left : left + 100].sum()  # the longest caption has the most ink
    for i in range(2):
        assert ink[top + i * 100 :][:96, :left].any()
    border = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
    assert not border.any(), "a label is cut off"


@pytest.mark.parametrize(("side", "shown"), [(8, 96), (32, 96), (40, 120), (96, 96), (200, 200), (512, 256)])
def test_grid_shows_pictures_of_all_sizes_legibly(side, shown):
    grid = np.asarray(image_grid({"1 step": torch.full((1, 3, side, side), 0.5)}, [""]))
    grey = (grid == 128).all(-1)
    assert (grey.any(0).sum(), grey.any(1).sum()) == (shown, shown)


def test_grid_keeps_the_proportions():
    grid = np.asarray(image_grid({"1 step": torch.full((1, 3, 16, 32), 0.5)}, [""]))
    grey = (grid == 128).all(-1)
    assert (grey.any(0).sum(), grey.any(1).sum()) == (96, 48)


def test_student_beside_teacher_in_tensorboard(tmp_path):
    module = PictureDistillation(strength=0.0, optimizer=partial(torch.optim.SGD, lr=0.5))
    fit(tmp_path, module, LogImages(PROMPTS))
    grids = logged_grids(tmp_path)
    assert len(grids) == 2  # one a validation, none for the sanity check
    for grid in grids:
        one, two, teacher = cells(grid, 3, 3)
        truth = module.adapter.encode_prompt(PROMPTS)["picture"].div(2).add(0.5).mul(255).round().byte()
        truth = truth.permute(0, 2, 3, 1).numpy().repeat(3, axis=1).repeat(3, axis=2)
        assert np.abs(teacher.astype(int) - truth).max() <= 1
        assert not np.array_equal(one, teacher)
        assert not np.array_equal(two, teacher)
    assert not np.array_equal(cells(grids[0], 3, 3)[0], cells(grids[1], 3, 3)[0])  # the student has moved


def test_the_teacher_is_drawn_once(tmp_path, monkeypatch):
    drawn = []
    sample = PictureDistillation.sample

    def counted(self, prompts, nfe, seeds=None, network="student", **kwargs):
        drawn.append((network, nfe, tuple(seeds)))
        return sample(self, prompts, nfe, seeds, network, **kwargs)

    monkeypatch.setattr(PictureDistillation, "sample", counted)
    fit(tmp_path, PictureDistillation(with_metric=False), LogImages(PROMPTS, seed=5), epochs=3)
    student = [("student", 1, (5, 6, 7)), ("student", 2, (5, 6, 7))]
    assert drawn == [*student, ("teacher", 4, (5, 6, 7)), *student, *student]


def test_prompts_are_the_first_different_ones_of_the_validation_set(tmp_path):
    callback = LogImages(columns=5)
    trainer = fit(tmp_path, PictureDistillation(), callback, epochs=1)
    asked = [prompt for batch in trainer.val_dataloaders for prompt in batch["prompt"]]
    assert callback.prompts == list(dict.fromkeys(asked))[:5]
    assert len(set(callback.prompts)) == 5
    fit(tmp_path, PictureDistillation(), wide := LogImages(columns=100), epochs=1)
    assert wide.prompts == list(dict.fromkeys(asked[:8]))  # of the first batch


def test_without_a_teacher_there_is_no_teacher_row(tmp_path):
    fit(tmp_path / "with", PictureDistillation(), LogImages(PROMPTS), epochs=1)
    fit(tmp_path / "without", PictureTraining(), LogImages(PROMPTS), epochs=1)
    (with_teacher,), (without,) = logged_grids(tmp_path / "with"), logged_grids(tmp_path / "without")
    assert with_teacher.shape[0] - without.shape[0] == 100
    assert cells(without, 2, 3).std() > 0


@pytest.mark.parametrize("logger", [False, "csv"])
def test_without_tensorboard_nothing_is_drawn(tmp_path, monkeypatch, logger):
    monkeypatch.setattr(PictureDistillation, "sample", lambda *args, **kwargs: pytest.fail("drawn for nobody"))
    logger = CSVLogger(tmp_path) if logger == "csv" else False
    trainer = fit(tmp_path, PictureDistillation(with_metric=False), LogImages(), logger=logger)
    assert trainer.global_step == 2


def test_every_n_validations_over_a_resume(tmp_path):
    callback = LogImages(PROMPTS, every_n_validations=2)
    fit(tmp_path / "first", PictureDistillation(), callback, epochs=3)
    assert len(logged_grids(tmp_path / "first")) == 2  # validations 1 and 3
    resumed = LogImages(every_n_validations=2)
    resumed.load_state_dict(callback.state_dict())
    assert resumed.prompts == PROMPTS
    fewer = LogImages(columns=1)
    fewer.load_state_dict(callback.state_dict())
    assert fewer.prompts is None
    fit(tmp_path / "second", PictureDistillation(), resumed, epochs=2)  # validations 4 and 5
    assert len(logged_grids(tmp_path / "second")) == 1


def test_training_goes_on_in_training_mode(tmp_path):
    module = PictureDistillation()
    fit(tmp_path, module, LogImages(PROMPTS))
    assert module.student.training
    assert module.student.strength.requires_grad


@pytest.mark.parametrize("settings", [{"prompts": []}, {"columns": 0}, {"every_n_validations": 0}])
def test_settings_that_cannot_work(settings):
    with pytest.raises(ConfigurationError, match="LogImages"):
        LogImages(**settings)


def test_a_method_without_pictures():
    with pytest.raises(ConfigurationError, match="LogImages needs a method that draws pictures, and Scripted draws none"):
        LogImages().setup(None, Scripted({}), "fit")
