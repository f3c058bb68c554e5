import errno
import math
import os

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer

from lightning_distill.callbacks.checkpoint import AtomicCheckpoint
from lightning_distill.callbacks.checkpoint_io import AtomicCheckpointIO
from lightning_distill.data import ShapesData
from lightning_distill.errors import ConfigurationError, NonFiniteError, StorageError
from tests.toy import ToyModule

INF = math.inf


def fit(
    directory, plugins=None, max_steps=4, ckpt_path=None, callbacks=(), module=None, **settings
) -> tuple[Trainer, AtomicCheckpoint]:
    checkpoint = AtomicCheckpoint(str(directory), **settings)
    trainer = Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[*callbacks, checkpoint],
        plugins=plugins,
    )
    data = ShapesData(size=16, batch_size=8, prompts_per_category=1)
    trainer.fit(module or ToyModule(), data, ckpt_path=ckpt_path)
    return trainer, checkpoint


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def step(path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


def test_failed_save_leaves_the_old_checkpoint_and_no_partial_file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"weight": torch.ones(2)}, path)

    def save_half(checkpoint, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(StorageError, match=r"no space left on the disk of '.*a.ckpt'; free some"):
        writer.save_checkpoint({"weight": torch.zeros(2)}, path)
    assert names(path.parent) == ["a.ckpt"]
    assert torch.load(path)["weight"].tolist() == [1, 1]
    monkeypatch.undo()
    writer.save_checkpoint({"weight": torch.zeros(2)}, path)
    assert torch.load(path)["weight"].tolist() == [0, 0]
    assert names(path.parent) == ["a.ckpt"]


def test_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    path, events = tmp_path / "a.ckpt", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append(("fsync", path.exists())), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(("replace", path.exists())), replace(old, new)))
    AtomicCheckpointIO().save_checkpoint({"a": 1}, path)
    assert events == [("fsync", False), ("replace", False), ("fsync", True)]


def test_last_states_are_kept_and_linked(tmp_path):
    trainer, checkpoint = fit(tmp_path, every_n_train_steps=1)
    assert names(tmp_path) == ["epoch=1-step=3.ckpt", "epoch=1-step=4.ckpt", "last.ckpt"]
    assert os.readlink(tmp_path / "last.ckpt") == "epoch=1-step=4.ckpt"
    assert [state.step for state in checkpoint.saved_states] == [3, 4]
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO


def test_number_of_kept_states_is_a_setting(tmp_path):
    fit(tmp_path, every_n_train_steps=1, keep_last=1)
    assert names(tmp_path) == ["epoch=1-step=4.ckpt", "last.ckpt"]
    with pytest.raises(ConfigurationError, match=r"AtomicCheckpoint.keep_last is 0"):
        AtomicCheckpoint(str(tmp_path), keep_last=0)


def test_resumed_run_removes_the_states_of_the_first(tmp_path):
    fit(tmp_path, every_n_train_steps=1)
    fit(tmp_path, every_n_train_steps=1, max_steps=6, ckpt_path="last")
    assert [step(tmp_path / name) for name in names(tmp_path)] == [5, 6, 6]


def test_best_states_are_kept_beside_the_last(tmp_path):
    class Metric(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.log("score", torch.tensor(float(abs(trainer.global_step - 2))))

    fit(tmp_path, monitor="score", every_n_train_steps=1, max_steps=5, filename="{step}", callbacks=[Metric()])
    assert names(tmp_path) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=5.ckpt"]


def test_last_checkpoint_that_is_a_copy_keeps_its_state(tmp_path):
    fit(tmp_path, every_n_train_steps=4)
    os.replace(tmp_path / "epoch=1-step=4.ckpt", tmp_path / "last.ckpt")
    fit(tmp_path, every_n_train_steps=2, max_steps=6, ckpt_path=tmp_path / "last.ckpt")
    assert names(tmp_path) == ["epoch=1-step=4.ckpt", "epoch=2-step=6.ckpt", "last.ckpt"]
    assert [step(tmp_path / name) for name in names(tmp_path)] == [4, 6, 6]


def test_remains_of_killed_processes_are_removed(tmp_path):
    (tmp_path / ".epoch=0-step=1.ckpt.unfinished").write_bytes(bytes(100))
    (tmp_path / ".a.ckpt.unfinished").mkdir()
    (tmp_path / ".epoch=9-step=9.ckpt.replaced").mkdir()
    (tmp_path / "epoch=9-step=9.ckpt").mkdir()
    (tmp_path / ".notes.unfinished").touch()
    fit(tmp_path, every_n_train_steps=4)
    assert names(tmp_path) == [".notes.unfinished", "epoch=1-step=4.ckpt", "epoch=9-step=9.ckpt", "last.ckpt"]


class Stop(Callback):
    """Stops training after a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step == self.at


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({"max_steps": 5, "every_n_train_steps": 3}, [3, 5]),
        ({"max_steps": 6, "every_n_train_steps": 3}, [3, 6]),
        ({"max_steps": 6, "every_n_train_steps": 4}, [4, 6]),  # the end of an epoch
        ({"max_steps": 9, "every_n_train_steps": 4, "callbacks": [Stop(5)]}, [4, 5]),
        ({"max_steps": 3, "every_n_train_steps": 2, "save_top_k": 0}, [2, 3]),
        ({"max_steps": 3}, [2, 3]),  # one state per epoch
        ({"max_steps": 3, "every_n_train_steps": 2, "save_last": False}, [2, 3]),
    ],
)
def test_last_step_is_saved_once(tmp_path, monkeypatch, settings, saved):
    steps, save = [], Trainer.save_checkpoint
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda self, *args: (steps.append(self.global_step), save(self, *args)))
    _, checkpoint = fit(tmp_path, **settings)
    assert steps == saved
    assert step(checkpoint.best_model_path or tmp_path / "last.ckpt") == saved[-1]


def test_nothing_is_saved_without_a_step(tmp_path):
    fit(tmp_path, every_n_train_steps=3, max_steps=5)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    fit(tmp_path, every_n_train_steps=3, max_steps=5, ckpt_path="last")
    fit(tmp_path, every_n_train_steps=3, max_steps=0)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_fast_dev_run_writes_nothing(tmp_path):
    checkpoint = AtomicCheckpoint(str(tmp_path / "new"), every_n_train_steps=1)
    trainer = Trainer(accelerator="cpu", fast_dev_run=True, enable_model_summary=False, callbacks=[checkpoint])
    trainer.fit(ToyModule(), ShapesData(size=16, batch_size=8, prompts_per_category=1))
    assert not (tmp_path / "new").exists()


class Spoil(Callback):
    """Spoils a tensor of the module after a step, past all checks of losses and gradients."""

    def __init__(self, at: int, part: str, value: float) -> None:
        self.at, self.part, self.value = at, part, value

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            parts = {
                "parameter": lambda: next(pl_module.parameters()).data,
                "buffer": lambda: pl_module.mask,
                "optimizer": lambda: next(iter(trainer.optimizers[0].state.values()))["exp_avg_sq"],
            }
            parts[self.part]().view(-1)[0] = self.value


class MaskedModule(ToyModule):
    """A module with a mask of minus infinity."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor([-INF, 0.0]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize(
    ("part", "value"), [("parameter", math.nan), ("parameter", INF), ("buffer", math.nan), ("optimizer", INF)]
)
def test_state_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path, part, value):
    with pytest.raises(NonFiniteError, match="is not finite at step 3"):
        fit(tmp_path, every_n_train_steps=1, module=MaskedModule(), callbacks=[Spoil(3, part, value)])
    assert names(tmp_path) == ["epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt", "last.ckpt"]
    assert step(tmp_path / "last.ckpt") == 2


def test_infinite_buffer_is_saved(tmp_path):
    fit(tmp_path, every_n_train_steps=1, module=MaskedModule(), callbacks=[Spoil(3, "buffer", INF)])
    assert step(tmp_path / "last.ckpt") == 4


def test_newest_good_checkpoint_is_the_last(tmp_path):
    fit(tmp_path, every_n_train_steps=1, keep_last=3)
    newest, second = tmp_path / "epoch=1-step=4.ckpt", tmp_path / "epoch=1-step=3.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 0x10
    newest.write_bytes(content)
    checkpoint = torch.load(second, weights_only=True)
    next(iter(checkpoint["state_dict"].values())).view(-1)[0] = math.nan
    torch.save(checkpoint, second)
    with pytest.warns(UserWarning, match="it is skipped, and ckpt_path 'last' is") as found:
        trainer, _ = fit(tmp_path, every_n_train_steps=1, ckpt_path="last")
    skipped = [str(warning.message) for warning in found if "skipped" in str(warning.message)]
    assert ["step=4" in skipped[0], "is damaged" in skipped[0]] == [True, True]
    assert ["step=3" in skipped[1], "is not finite" in skipped[1]] == [True, True]
    assert trainer.ckpt_path.endswith("epoch=0-step=2.ckpt")


def test_error_if_all_checkpoints_are_damaged(tmp_path):
    fit(tmp_path, every_n_train_steps=4)
    path = tmp_path / "epoch=1-step=4.ckpt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigurationError, match=r"step=4.ckpt' is damaged"):
        fit(tmp_path, every_n_train_steps=4, ckpt_path="last")


def test_checkpoint_io_of_the_user_is_not_replaced(tmp_path):
    class UserCheckpointIO(TorchCheckpointIO):
        pass

    trainer, _ = fit(tmp_path, plugins=[UserCheckpointIO()])
    assert type(trainer.strategy.checkpoint_io) is UserCheckpointIO
