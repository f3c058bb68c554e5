"""Pipelines of diffusers that draw in a few steps, by average velocities.

This file imports torch, diffusers and siblings that travel with it: it is part of every exported student and must run without
this package.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor, nn

from .two_time import TwoTimeModel


def align_weights(module: nn.Module) -> None:
    """Give weights that lie in a memory-mapped file aligned memory of their own, where torch allocates all others.

    The order in which a matrix product is summed, and with it the last bit, depends on the alignment.
    """
    for parameter in module.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


class FewStepPipeline(DiffusionPipeline, ABC):
    """Draws with a two-time transformer, told start and end of each step, under `AverageVelocityScheduler`.

    To be inherited before a stock pipeline, whose components, loading and devices it keeps. Guidance is distilled into the
    transformer, so a step is one forward. A family says how prompts and velocities look, and latents where its autoencoder is
    not the usual one; training asks the same methods. Latents are (B, C, h, w), float32, normalised to about unit scale; times
    are (B,), float32, in [0, 1], and 1 is noise.
    """

    stock_class: ClassVar[type[DiffusionPipeline]]
    """The pipeline of diffusers."""
    network_class: ClassVar[type[TwoTimeModel]]
    """The two-time transformer."""
    prompt_tokenizer: ClassVar[str] = "tokenizer"
    """Component whose `model_max_length` tells how many tokens a prompt is padded to."""
    default_sequence_length: ClassVar[int] = 512
    """Most of those tokens, unless told otherwise: the stock pipeline's own default."""
    patch_size = 2
    """Latents on a side of an image token."""

    @abstractmethod
    def encode_condition(self, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
        """What the transformer is told about B prompts: named tensors with the batch in front.

        Args:
            prompts: The empty prompt gives the null condition of guidance.
            max_sequence_length: Tokens to pad to.
        """

    @abstractmethod
    def network_inputs(
        self, x_t: Tensor, condition: dict[str, Tensor], guidance_scale: Tensor | None, network: TwoTimeModel
    ) -> dict[str, Any]:
        """Arguments of the transformer, but for the times.

        Args:
            x_t: Latents (B, C, h, w), of the transformer's dtype.
            condition: Of `encode_condition`; embeddings are of that dtype too.
            guidance_scale: (B,), float32, where the transformer embeds it.
            network: The transformer.
        """

    def velocity_of(self, output: Any, height: int, width: int) -> Tensor:
        """Velocity (B, C, height, width) of what the transformer returns."""
        velocity: Tensor = output
        return velocity

    def average_velocity(
        self,
        network: TwoTimeModel,
        x_t: Tensor,
        r: Tensor | None,
        t: Tensor,
        condition: dict[str, Tensor],
        guidance_scale: Tensor | None,
        all_points: bool = False,
    ) -> Tensor:
        """The network's average velocity from t down to r, (B, C, h, w) in the dtype of `x_t`; at t where r is None.

        Args:
            network: A `network_class`.
            x_t: Latents (B, C, h, w).
            r: Ends (B,).
            t: Starts (B,).
            condition: Of `encode_condition`.
            guidance_scale: (B,), where the network embeds it.
            all_points: As of `TwoTimeModel`.
        """
        # Text encoders may be kept in lower precision than the transformer.
        dtype = network.dtype
        condition = {name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()}
        inputs = self.network_inputs(x_t.to(dtype), condition, guidance_scale, network)
        further = {"all_points": True} if all_points else {}
        (output,) = network(**inputs, timestep=t, timestep_r=r, return_dict=False, **further)
        return self.velocity_of(output, *x_t.shape[-2:]).to(x_t.dtype)

    def encode_latents(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]: the posterior's mean, shifted and scaled."""
        encoded = self.vae.encode(images.to(self.vae.dtype))
        latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        return ((latents - self._latent_shift) * self.vae.config.scaling_factor).float()

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), float32, about [-1, 1], of latents (B, C, h, w)."""
        latents = latents / self.vae.config.scaling_factor + self._latent_shift
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    @property
    def _latent_shift(self) -> float:
        return self.vae.config.get("shift_factor") or 0.0

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        channels: int = self.vae.config.latent_channels
        return channels

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of an image of H x W pixels.

        Raises:
            ValueError: If they are no multiples of the autoencoder's factor times the transformer's patch.
        """
        factor, multiple = self.vae_scale_factor, self.vae_scale_factor * self.patch_size
        if height % multiple or width % multiple:
            raise ValueError(f"images of {height} x {width} do not fit; use multiples of {multiple} pixels")
        return self.latent_channels, height // factor, width // factor

    @property
    def default_size(self) -> int:
        """Pixels of a side where none are asked for: what the autoencoder was made for, or the stock pipeline's default."""
        size: int = self.vae.config.get("sample_size") or self.default_sample_size * self.vae_scale_factor
        return size

    def time_shift(self, latent_shape: tuple[int, ...]) -> float:
        """Shift of the grid of times toward noise for latents (C, h, w): the scheduler's, which may grow with their size."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        tokens = (latent_shape[-2] // self.patch_size) * (latent_shape[-1] // self.patch_size)
        mu = calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        return math.exp(mu)

    def mix_guidance(self, v_cond: Tensor, v_null: Tensor, scale: Tensor) -> Tensor:
        """The teacher's guided velocity of two branches, (B, C, h, w) each, under scales (B,) (arXiv 2207.12598)."""
        return v_cond + (scale - 1)[:, None, None, None] * (v_cond - v_null)

    @classmethod
    def stock_guidance(cls, guidance_scale: float, embeds_guidance: bool) -> dict[str, Any]:
        """Arguments by which the stock pipeline guides a teacher; 1 is no guidance where it is not embedded."""
        return {"guidance_scale": guidance_scale}

    @property
    def sequence_length(self) -> int:
        """Tokens that prompts are padded to, unless told otherwise."""
        return min(self.default_sequence_length, tokenizer_within(getattr(self, self.prompt_tokenizer)).model_max_length)

    def register_modules(self, **modules: Any) -> None:
        """Register the components, such that they compute what they compute in training, to the last bit."""
        super().register_modules(**modules)
        for name, module in modules.items():
            if not isinstance(module, nn.Module):
                continue
            align_weights(module)
            # Even under no_grad, torch may order a sum differently where weights require gradients.
            if name != "transformer":
                module.requires_grad_(False)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        max_sequence_length: int | None = None,
        **condition: Tensor,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw pictures.

        Args:
            prompt: One prompt, or B of them. Leave it out where its embeddings are given.
            height: Pixels; None is the size that the autoencoder was made for.
            width: Likewise.
            num_inference_steps: Steps, one forward each.
            guidance_scale: For transformers that embed it; others have their guidance built in and ignore this.
            num_images_per_prompt: Pictures of each prompt, M.
            generator: Source of the noise, one for all pictures or one a picture.
            latents: Noise (B M, C, h, w) in place of the generator's.
            output_type: "pil", "np", "pt" (in [0, 1]) or "latent".
            return_dict: Whether to wrap the result.
            max_sequence_length: Tokens of a prompt; None is what the tokenizer was made for.
            **condition: Embeddings of B prompts, by the names of `encode_condition`.

        Returns:
            The pictures as `images`, or in a tuple.

        Raises:
            ValueError: If the pictures' size does not fit, or inputs are missing or doubled.
        """
        if (prompt is None) == (not condition):
            raise ValueError("pass either a prompt or embeddings of prompts")
        shape = self.latent_shape(height or self.default_size, width or self.default_size)
        device = self._execution_device
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            condition = self.encode_condition(prompts, max_sequence_length or self.sequence_length)
        condition = {name: value.repeat_interleave(num_images_per_prompt, dim=0) for name, value in condition.items()}
        count = len(next(iter(condition.values())))
        # States stay in float32 between steps, whatever the precision of the transformer.
        if latents is None:
            latents = randn_tensor((count, *shape), generator=generator, device=device, dtype=torch.float32)
        x = latents.to(device, torch.float32)
        guidance = torch.full((count,), guidance_scale, device=device) if self.embeds_guidance else None

        self.scheduler.set_timesteps(num_inference_steps, device=device, shift=self.time_shift(tuple(x.shape[1:])))
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for t, r in self.scheduler.intervals:
                u = self.average_velocity(self.transformer, x, r.expand(count), t.expand(count), condition, guidance)
                (x,) = self.scheduler.step(u, t, x, generator, return_dict=False)
                progress_bar.update()

        images = x
        if output_type != "latent":
            images = VaeImageProcessor().postprocess(self.decode_latents(x), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def embeds_guidance(self) -> bool:
        """Whether the transformer takes the guidance scale as an input."""
        return bool(self.transformer.config.get("guidance_embeds", False))


def tokenizer_within(component: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(component, "tokenizer", component)


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
