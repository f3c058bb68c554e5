"""Training of the variational autoencoder whose latents a teacher lives in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.monitors import check_monitors
from lightning_distill.outputs import check_directory, writing


class Autoencoder(LightningModule):
    r"""Variational autoencoder (arXiv 1312.6114) of the kind that latent diffusion uses (arXiv 2112.10752).

    .. math:: L = |D(z) - x|^2 + |D(z) - x| + \beta \, KL(q(z|x) \| N(0, 1)), \quad z \sim q(z|x),

    with means over all entries. When `fit` ends, a scale and a shift are measured over the last training batches. They give the
    posteriors' means zero mean and unit variance. They are written with the weights, as a diffusers directory.

    Args:
        output: Directory the trained `AutoencoderKL` is written to. None is `vae` in the trainer's `default_root_dir`.
        block_out_channels: Channels of each level; each level but the last halves the resolution.
        layers_per_block: Residual blocks a level.
        latent_channels: Channels of the latents.
        norm_num_groups: Groups of the group norms.
        kl_weight: The weight beta, above 0. Larger values make the decoder more tolerant of imperfect latents.
        optimizer: Callable from parameters to an optimizer.
        lr_scheduler: Callable from the optimizer to a scheduler that steps once a batch, or None.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    def __init__(
        self,
        output: str | None = None,
        block_out_channels: Sequence[int] = (16, 32, 64),
        layers_per_block: int = 1,
        latent_channels: int = 16,
        norm_num_groups: int = 8,
        kl_weight: float = 1e-3,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        counts = {"layers_per_block": layers_per_block, "latent_channels": latent_channels, "norm_num_groups": norm_num_groups}
        for name, count in counts.items():
            if count < 1:
                raise ConfigurationError(f"model.{name} is {count}; set it to at least 1")
        if not block_out_channels or any(channels < 1 or channels % norm_num_groups for channels in block_out_channels):
            raise ConfigurationError(
                f"model.block_out_channels is {list(block_out_channels)}; list multiples of model.norm_num_groups, "
                f"{norm_num_groups}, one a level"
            )
        if not kl_weight > 0:
            raise ConfigurationError(f"model.kl_weight is {kl_weight}; give a weight above 0, 1e-3 is usual")
        self.output = output
        self.kl_weight = kl_weight
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        levels = len(block_out_channels)
        self.vae = AutoencoderKL(
            block_out_channels=tuple(block_out_channels),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=False,  # latents stay local, which a small teacher learns sooner
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        self.moments: list[Tensor] = []  # mean and mean square of the latents of each of the last batches

    def setup(self, stage: str) -> None:
        """Check the monitored metrics, and that the autoencoder can be written.

        Raises:
            ConfigurationError: If a callback monitors a metric that validation does not log, or `output` cannot be written.
        """
        if stage == "fit":
            check_monitors(self.validation_metrics, self.trainer)
        if stage == "fit" and not self._is_dry_run:
            check_directory(self._target, "model.output")

    def on_train_start(self) -> None:
        """Check that a new run replaces no other autoencoder.

        Raises:
            ConfigurationError: If it does.
        """
        if self.trainer.global_step == 0 and not self._is_dry_run and (self._target / "config.json").exists():
            raise ConfigurationError(
                f"model.output is {str(self._target)!r}, which has an autoencoder; set it to another directory"
            )

    @property
    def _is_dry_run(self) -> bool:
        return bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by a helper of Trainer's constructor

    @property
    def _target(self) -> Path:
        return Path(self.trainer.default_root_dir) / "vae" if self.output is None else Path(self.output)

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """Names of the metrics that validation logs, which callbacks can monitor."""
        return ("val/mae",)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Reconstruct `batch["image"]`, (B, 3, H, W) in [-1, 1]."""
        posterior = self.vae.encode(batch["image"]).latent_dist
        latents = posterior.sample()
        error = self.vae.decode(latents).sample - batch["image"]
        # KL of one latent entry, in nats: diffusers sums over entries, and a mean keeps the weight free of the size.
        kl = posterior.kl().mean() / latents[0].numel()
        loss = error.square().mean() + error.abs().mean() + self.kl_weight * kl
        mode = posterior.mode().detach().double()
        self.moments = [*self.moments[-63:], torch.stack([mode.mean(), mode.square().mean()])]
        self.log_dict({"train/loss": loss, "train/mae": error.abs().mean(), "train/kl": kl}, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the error of reconstructions from the posterior's mean."""
        latents = self.vae.encode(batch["image"]).latent_dist.mode()
        error = self.vae.decode(latents).sample - batch["image"]
        self.log("val/mae", error.abs().mean(), prog_bar=True)

    def on_train_end(self) -> None:
        """Measure the scale of the latents and write the autoencoder."""
        mean, square = torch.stack(self.moments).mean(0).tolist()
        self.vae.register_to_config(scaling_factor=(square - mean**2) ** -0.5, shift_factor=mean)
        if self.trainer.is_global_zero and not self._is_dry_run:
            with writing(self._target):
                self.vae.save_pretrained(self._target)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the scale is measured by."""
        checkpoint["moments"] = self.moments

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        self.moments = [each.to(self.device) for each in checkpoint["moments"]]

    def configure_optimizers(self) -> Any:
        """One optimizer over all weights, with its scheduler stepping once a batch."""
        optimizer = self.optimizer(self.vae.parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}
