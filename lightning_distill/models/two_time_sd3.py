"""Stable Diffusion 3 and 3.5.

This file imports torch, diffusers and siblings that travel with it: it is part of every exported student and must run without
this package.
"""

import math
from typing import ClassVar

from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from .few_step import FewStepPipeline
from .two_time import TwoTimeModel


class TwoTimeSD3Transformer2DModel(TwoTimeModel, SD3Transformer2DModel):
    """SD3 transformer with a second time input; latents and prompts go in as in the stock one."""

    timestep_scale: ClassVar[float] = 1000.0


class TwoTimeStableDiffusion3Pipeline(FewStepPipeline, StableDiffusion3Pipeline):
    """Stable Diffusion 3 and 3.5 in a few steps."""

    stock_class = StableDiffusion3Pipeline
    network_class = TwoTimeSD3Transformer2DModel
    prompt_tokenizer: ClassVar[str] = "tokenizer_3"
    default_sequence_length: ClassVar[int] = 256

    def encode_condition(self, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
        """`prompt_embeds` (B, L, D) of both CLIPs and T5, and `pooled_prompt_embeds` (B, P) of both CLIPs."""
        prompt_embeds, _, pooled, _ = self.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}

    def average_velocity(
        self,
        network: TwoTimeModel,
        x_t: Tensor,
        r: Tensor | None,
        t: Tensor,
        condition: dict[str, Tensor],
        guidance_scale: Tensor | None,
    ) -> Tensor:
        """The network's average velocity from t down to r, (B, C, h, w) in the dtype of `x_t`; at t where r is None."""
        dtype = network.dtype
        (velocity,) = network(
            hidden_states=x_t.to(dtype),
            encoder_hidden_states=condition["prompt_embeds"].to(dtype),
            pooled_projections=condition["pooled_prompt_embeds"].to(dtype),
            timestep=t,
            timestep_r=r,
            return_dict=False,
        )
        return velocity.to(x_t.dtype)

    def encode_latents(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]: the posterior's mean, shifted and scaled."""
        latents = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mode()
        return ((latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor).float()

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), float32, about [-1, 1], of latents (B, C, h, w)."""
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of an image of H x W pixels, both multiples of the VAE's factor times the patch."""
        factor, multiple = self.vae_scale_factor, self.vae_scale_factor * self.patch_size
        if height % multiple or width % multiple:
            raise ValueError(f"images of {height} x {width} do not fit; use multiples of {multiple} pixels")
        return self.vae.config.latent_channels, height // factor, width // factor

    def time_shift(self, latent_shape: tuple[int, ...]) -> float:
        """The scheduler's shift, which for 3.5 medium grows with the resolution."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        tokens = (latent_shape[-2] // self.patch_size) * (latent_shape[-1] // self.patch_size)
        mu = calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        return math.exp(mu)
