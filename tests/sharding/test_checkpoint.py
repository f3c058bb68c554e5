"""Checkpoint directories of a sharded strategy, by one process."""

import errno
import math
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_distill.callbacks.checkpoint import AtomicCheckpoint
from lightning_distill.data import ShapesData
from lightning_distill.errors import ConfigurationError, NonFiniteError, StorageError
from lightning_distill.sharding.checkpoint import _ShardWriter
from lightning_distill.sharding.checkpoint_files import check_undamaged
from lightning_distill.sharding.fsdp2 import FSDP2Strategy
from tests.processes import reserve_port
from tests.toy import ToyModule


class SharedToyModule(ToyModule):
    def configure_model(self):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Spoil(Callback):
    """Spoils a weight after a step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            next(pl_module.parameters()).data.view(-1)[0] = math.nan


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(reserve_port()))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def fit(directory: Path, max_steps: int = 4, ckpt_path: object = None, *callbacks: Callback) -> Trainer:
    trainer = Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        devices=1,
        strategy=FSDP2Strategy(),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[*callbacks, AtomicCheckpoint(str(directory), every_n_train_steps=1)],
    )
    data = ShapesData(size=16, batch_size=8, prompts_per_category=1)
    trainer.fit(SharedToyModule(), data, ckpt_path=ckpt_path)
    return trainer


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_last_directories_are_kept_linked_and_resumed(tmp_path):
    fit(tmp_path)
    assert names(tmp_path) == ["epoch=1-step=3.ckpt", "epoch=1-step=4.ckpt", "last.ckpt"]
    assert os.readlink(tmp_path / "last.ckpt") == "epoch=1-step=4.ckpt"
    assert names(tmp_path / "last.ckpt") == [".metadata", "SHA256SUMS", "__0_0.distcp", "rest.pt"]
    check_undamaged(tmp_path / "last.ckpt")
    assert fit(tmp_path, 6, "last").global_step == 6
    assert names(tmp_path) == ["epoch=2-step=5.ckpt", "epoch=2-step=6.ckpt", "last.ckpt"]


def test_damaged_directory_is_refused_or_skipped(tmp_path):
    fit(tmp_path)
    flip(tmp_path / "epoch=1-step=4.ckpt" / "__0_0.distcp")
    with pytest.raises(ConfigurationError, match=r"step=4.ckpt' is damaged: __0_0.distcp is not what was written"):
        fit(tmp_path, 6, tmp_path / "epoch=1-step=4.ckpt")
    with pytest.warns(UserWarning, match=r"step=4.ckpt' is damaged.* it is skipped"):
        assert fit(tmp_path, 5, "last").ckpt_path.endswith("step=3.ckpt")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(NonFiniteError, match="the network is not finite at step 3"):
        fit(tmp_path, 4, None, Spoil())
    assert names(tmp_path) == ["epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt", "last.ckpt"]


def test_full_disk_leaves_no_partial_directory(tmp_path, monkeypatch):
    fit(tmp_path)

    def write_data(self, *args, **kwargs):
        (Path(self.path) / "__0_0.distcp").write_bytes(bytes(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_ShardWriter.__mro__[1], "write_data", write_data)
    with pytest.raises(StorageError, match=r"no space left on the disk of '.*step=5.ckpt"):
        fit(tmp_path, 6, "last")
    assert names(tmp_path) == ["epoch=1-step=3.ckpt", "epoch=1-step=4.ckpt", "last.ckpt"]
