"""FLUX.1: dev, lite and schnell-type pipelines.

This file imports torch, diffusers and siblings that travel with it: it is part of every exported student and must run without
this package.
"""

import math
from typing import ClassVar

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from .few_step import FewStepPipeline
from .two_time import TwoTimeModel


class TwoTimeFluxTransformer2DModel(TwoTimeModel, FluxTransformer2DModel):
    """FLUX transformer with a second time input; image tokens and prompts go in as in the stock one."""


class TwoTimeFluxPipeline(FewStepPipeline, FluxPipeline):
    """FLUX.1 in a few steps."""

    stock_class = FluxPipeline
    network_class = TwoTimeFluxTransformer2DModel
    prompt_tokenizer: ClassVar[str] = "tokenizer_2"

    def encode_condition(self, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
        """`prompt_embeds` (B, L, D) of T5 and `pooled_prompt_embeds` (B, P) of CLIP."""
        prompt_embeds, pooled, _ = self.encode_prompt(prompts, None, max_sequence_length=max_sequence_length)
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
        prompt_embeds = condition["prompt_embeds"]
        # Text encoders may be kept in lower precision than the transformer, and its time embeddings are in higher.
        dtype = network.x_embedder.weight.dtype
        (tokens,) = network(
            hidden_states=pack_latents(x_t).to(dtype),
            encoder_hidden_states=prompt_embeds.to(dtype),
            pooled_projections=condition["pooled_prompt_embeds"].to(dtype),
            timestep=t,
            timestep_r=r,
            guidance=guidance_scale,
            img_ids=image_ids(x_t.shape[-2] // 2, x_t.shape[-1] // 2, x_t.device),
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=x_t.device),
            return_dict=False,
        )
        return unpack_latents(tokens.to(x_t.dtype), x_t.shape[-2], x_t.shape[-1])

    def encode_latents(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]: the posterior's mean, shifted and scaled."""
        latents = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mode()
        return ((latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor).float()

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), float32, about [-1, 1], of latents (B, C, h, w)."""
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of an image of H x W pixels, both multiples of twice the VAE's factor."""
        factor = self.vae_scale_factor
        if height % (2 * factor) or width % (2 * factor):
            raise ValueError(f"images of {height} x {width} do not fit; use multiples of {2 * factor} pixels")
        return self.vae.config.latent_channels, height // factor, width // factor

    def time_shift(self, latent_shape: tuple[int, ...]) -> float:
        """The scheduler's shift, which for FLUX.1-dev grows with the resolution."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        tokens = latent_shape[-2] * latent_shape[-1] // 4
        mu = calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        return math.exp(mu)


def pack_latents(latents: Tensor) -> Tensor:
    """Tokens (B, h/2 * w/2, 4 C) of latents (B, C, h, w), each a 2 x 2 patch, in FLUX's order."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents (B, C, height, width) of tokens (B, N, 4 C): the inverse of `pack_latents`."""
    batch, _, width_4c = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, width_4c // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, width_4c // 4, height, width)


def image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """Positions (rows * columns, 3) of image tokens: zero, row, column."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)[None]
    return ids.reshape(-1, 3)
