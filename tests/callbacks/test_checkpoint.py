import os

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer

from lightning_distill.callbacks.checkpoint import AtomicCheckpoint, AtomicCheckpointIO
from lightning_distill.data import ShapesData
from tests.toy import ToyModule


def fit(directory, plugins=None, **settings) -> tuple[Trainer, AtomicCheckpoint]:
    checkpoint = AtomicCheckpoint(str(directory), **settings)
    trainer = Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[checkpoint],
        plugins=plugins,
    )
    trainer.fit(ToyModule(), ShapesData(size=16, batch_size=8, prompts_per_category=1))
    return trainer, checkpoint


def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"weight": torch.ones(2)}, path)

    def save_half(checkpoint, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(OSError, match="No space left"):
        writer.save_checkpoint({"weight": torch.zeros(2)}, path)
    assert torch.load(path)["weight"].tolist() == [1, 1]
    monkeypatch.undo()
    writer.save_checkpoint({"weight": torch.zeros(2)}, path)
    assert torch.load(path)["weight"].tolist() == [0, 0]
    assert [item.name for item in path.parent.iterdir()] == ["a.ckpt"]


def test_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    path, events = tmp_path / "a.ckpt", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append(("fsync", path.exists())), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(("replace", path.exists())), replace(old, new)))
    AtomicCheckpointIO().save_checkpoint({"a": 1}, path)
    assert events == [("fsync", False), ("replace", False), ("fsync", True)]


def test_last_checkpoint_is_saved_by_the_atomic_writer(tmp_path):
    trainer, _ = fit(tmp_path, every_n_train_steps=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=1-step=4.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == 4
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO


def test_second_run_replaces_the_first(tmp_path):
    for _ in range(2):
        fit(tmp_path, every_n_train_steps=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=1-step=4.ckpt", "last.ckpt"]


def test_checkpoint_io_of_the_user_is_not_replaced(tmp_path):
    class UserCheckpointIO(TorchCheckpointIO):
        pass

    trainer, _ = fit(tmp_path, plugins=[UserCheckpointIO()])
    assert type(trainer.strategy.checkpoint_io) is UserCheckpointIO
