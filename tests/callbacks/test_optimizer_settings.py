import warnings

import pytest
from lightning.pytorch import Trainer

from lightning_distill.callbacks.checkpoint import AtomicCheckpoint
from lightning_distill.callbacks.optimizer_settings import OptimizerSettings
from lightning_distill.data import ShapesData
from tests.toy import ToyModule


def fit(directory, steps, ckpt_path=None, callbacks=(OptimizerSettings,), **settings) -> tuple[dict, object]:
    checkpoint = AtomicCheckpoint(str(directory), every_n_train_steps=1)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[checkpoint, *(kind() for kind in callbacks)],
    )
    trainer.fit(ToyModule(**settings), ShapesData(size=32, batch_size=8, prompts_per_category=1), ckpt_path=ckpt_path)
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    return trainer.optimizers[0].param_groups[0], schedulers[0] if schedulers else None


def test_changed_learning_rate_is_applied(tmp_path):
    fit(tmp_path, 2, lr=0.01)
    with pytest.warns(UserWarning, match=r"training continues with changed optimizer settings: lr 0\.01 -> 0\.002"):
        group, _ = fit(tmp_path, 3, tmp_path / "last.ckpt", lr=0.002)
    assert group["lr"] == 0.002


def test_without_the_callback_the_checkpoint_overrides(tmp_path):
    fit(tmp_path, 2, lr=0.01)
    group, _ = fit(tmp_path, 3, tmp_path / "last.ckpt", callbacks=(), lr=0.002)
    assert group["lr"] == 0.01


def test_scheduled_learning_rate_is_scaled(tmp_path):
    fit(tmp_path, 2, lr=0.01, decay=0.5)
    with pytest.warns(UserWarning, match=r"initial_lr 0\.01 -> 0\.002"):
        group, scheduler = fit(tmp_path, 3, tmp_path / "last.ckpt", lr=0.002, decay=0.5)
    assert group["lr"] == pytest.approx(0.002 * 0.5**3)
    assert scheduler.base_lrs == [0.002]


def test_unchanged_settings_are_not_touched(tmp_path):
    fit(tmp_path, 2, lr=0.01, decay=0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="training continues with changed")
        group, _ = fit(tmp_path, 3, tmp_path / "last.ckpt", lr=0.01, decay=0.5)
    assert group["lr"] == 0.01 * 0.5**3
