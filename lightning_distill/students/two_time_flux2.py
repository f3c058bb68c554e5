"""FLUX.2, dev and klein.

This file imports torch, diffusers and siblings that travel with it: it is part of every exported student and must run without
this package.
"""

import math
from typing import Any, ClassVar

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn

from .few_step import FewStepPipeline
from .policy import PolicyHead
from .two_time import JOINT_ATTENTION, TwoTimeModel

NOMINAL_STEPS = 50
"""FLUX.2's shift depends on the number of steps; students are trained on one grid, the teacher's."""


class TwoTimeFlux2Transformer2DModel(TwoTimeModel, Flux2Transformer2DModel):
    """FLUX.2 transformer with a second time input; image tokens and prompts go in as in the stock one."""

    output_layer: ClassVar[str | None] = "proj_out"
    policy_head_class: ClassVar[type[nn.Module] | None] = PolicyHead
    lora_targets: ClassVar[tuple[str, ...]] = (
        *JOINT_ATTENTION,
        "linear_in",
        "linear_out",
        "to_qkv_mlp_proj",
        "to_out",
    )


class FewStepFlux2(FewStepPipeline):
    """What FLUX.2's pipelines share. Its latents are patched 2 x 2 and normalised by the autoencoder's running statistics."""

    network_class = TwoTimeFlux2Transformer2DModel
    patch_size = 1

    def encode_condition(self, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
        """`prompt_embeds` (B, L, D) of three layers of the language model."""
        prompt_embeds, _ = self.encode_prompt(prompts, max_sequence_length=max_sequence_length)
        return {"prompt_embeds": prompt_embeds}

    def network_inputs(
        self, x_t: Tensor, condition: dict[str, Tensor], guidance_scale: Tensor | None, network: TwoTimeModel
    ) -> dict[str, Any]:
        """Arguments of the transformer, but for the times."""
        length, (height, width) = condition["prompt_embeds"].shape[1], x_t.shape[-2:]
        return {
            "hidden_states": x_t.flatten(2).mT,
            "encoder_hidden_states": condition["prompt_embeds"],
            "guidance": guidance_scale,
            "img_ids": positions(1, height, width, 1, x_t.device),
            "txt_ids": positions(1, 1, 1, length, x_t.device),
        }

    def velocity_of(self, output: Any, height: int, width: int) -> Tensor:
        """Velocity (B, C, height, width) of what the transformer returns."""
        tokens: Tensor = output
        return tokens.mT.unflatten(2, (height, width))

    @property
    def latent_channels(self) -> int:
        """C of the latents: four pixels of the autoencoder's."""
        channels: int = 4 * self.vae.config.latent_channels
        return channels

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of an image of H x W pixels, both multiples of twice the autoencoder's factor."""
        factor = 2 * self.vae_scale_factor
        if height % factor or width % factor:
            raise ValueError(f"images of {height} x {width} do not fit; use multiples of {factor} pixels")
        return self.latent_channels, height // factor, width // factor

    def encode_latents(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]."""
        latents = self._patchify_latents(self.vae.encode(images.to(self.vae.dtype)).latent_dist.mode().float())
        mean, std = self._statistics()
        return (latents - mean) / std

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), float32, about [-1, 1], of latents (B, C, h, w)."""
        mean, std = self._statistics()
        latents = self._unpatchify_latents(latents * std + mean)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    def _statistics(self) -> tuple[Tensor, Tensor]:
        mean, variance = (part.float()[:, None, None] for part in (self.vae.bn.running_mean, self.vae.bn.running_var))
        return mean, (variance + self.vae.config.batch_norm_eps).sqrt()

    def time_shift(self, latent_shape: tuple[int, ...]) -> float:
        """Shift of the grid of times: FLUX.2's, for `NOMINAL_STEPS`."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        return math.exp(compute_empirical_mu(latent_shape[-2] * latent_shape[-1], NOMINAL_STEPS))


class TwoTimeFlux2Pipeline(FewStepFlux2, Flux2Pipeline):
    """FLUX.2 dev in a few steps."""

    stock_class = Flux2Pipeline


class TwoTimeFlux2KleinPipeline(FewStepFlux2, Flux2KleinPipeline):
    """FLUX.2 klein, base or distilled, in a few steps."""

    stock_class = Flux2KleinPipeline


def positions(time: int, rows: int, columns: int, length: int, device: torch.device) -> Tensor:
    """Positions (time * rows * columns * length, 4) of tokens."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in (time, rows, columns, length)))
