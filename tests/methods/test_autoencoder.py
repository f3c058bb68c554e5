from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from lightning_distill.data.shapes_datamodule import ShapesData
from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.autoencoder import Autoencoder
from tests.methods.gaussian_runs import trainer


def test_saved_autoencoder_has_latents_of_unit_scale(tmp_path: Path) -> None:
    data = ShapesData(size=64, batch_size=16, prompts_per_category=2)
    small = {"block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 2}
    module = Autoencoder(str(tmp_path / "vae"), kl_weight=1e-3, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5), **small)
    before = [p.clone() for p in module.vae.parameters()]
    run = trainer(tmp_path, max_steps=4)
    run.fit(module, data)
    assert any(not torch.equal(a, b) for a, b in zip(before, module.vae.parameters(), strict=True))
    assert {"train/loss", "val/mae"} <= run.callback_metrics.keys()

    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    images = torch.cat([batch["image"] for batch in data.train_dataloader()])
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert scaled.std().item() == pytest.approx(1, abs=0.2)
    assert scaled.mean().item() == pytest.approx(0, abs=0.2)


def test_resumed_run_measures_the_scale_over_earlier_batches_as_well(tmp_path: Path) -> None:
    data = ShapesData(size=64, batch_size=16, prompts_per_category=2)
    small = {"block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 2}
    first, second = (Autoencoder(str(tmp_path / "vae"), **small) for _ in range(2))
    run = trainer(tmp_path, max_steps=3, limit_val_batches=0)
    run.fit(first, data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    trainer(tmp_path, max_steps=4, limit_val_batches=0).fit(second, data, ckpt_path=tmp_path / "last.ckpt")
    moments = torch.stack(second.moments)
    assert torch.equal(moments[:3], torch.stack(first.moments))
    config = AutoencoderKL.from_pretrained(tmp_path / "vae").config
    assert config.shift_factor == pytest.approx(moments[:, 0].mean().item())
    assert len(moments) == 4
    with pytest.raises(ConfigurationError, match=r"model\.output is '.*vae', which has an autoencoder; set it to another"):
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(second, data)


def test_dry_runs_write_no_autoencoder(tmp_path: Path) -> None:
    module = Autoencoder(block_out_channels=(4, 8), norm_num_groups=2, latent_channels=2)
    run = trainer(tmp_path, fast_dev_run=True)
    run.fit(module, ShapesData(size=64, batch_size=16, prompts_per_category=2))
    assert not list(tmp_path.iterdir())


def test_kl_weight_of_0_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"model\.kl_weight"):
        Autoencoder(kl_weight=0.0)
