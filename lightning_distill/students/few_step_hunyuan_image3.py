"""HunyuanImage 3.0 in a few steps: prompts to tokens, latents to pictures, and the sampler that every export carries.

This file imports torch, diffusers, transformers and siblings that travel with it: it is part of every exported student and must
run without this package.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from tokenizers import Tokenizer
from torch import Generator, Tensor
from transformers import AutoTokenizer

from .average_velocity_scheduler import AverageVelocityScheduler
from .few_step import align_weights
from .hunyuan_image3_layout import TokenLayout
from .two_time_hunyuan_image3 import TwoTimeHunyuanImage3, is_newer_form


class FewStepHunyuanImage3(TwoTimeHunyuanImage3):
    """A whole student, which draws in a few steps: what an export is loaded as."""

    left_out: ClassVar[tuple[str, ...]] = ()
    vae: Any
    tokenizer: Any
    image_processor: Any
    generation_config: Any

    def load_tokenizer(self, tokenizer: str) -> None:
        """Load the tokenizer from the student's directory."""
        load_tokenizer(self, self.published, tokenizer)

    @property
    def layout(self) -> TokenLayout:
        """How prompts and pictures become tokens."""
        return layout_of(self, self.config.system_prompt, self.config.max_sequence_length)

    @property
    def default_size(self) -> int:
        """Pixels of a side where none are asked for: what the checkpoint was made for."""
        size: int = self.config.image_base_size
        return size

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of an image of H x W pixels.

        Raises:
            ValueError: If the checkpoint has no such size.
        """
        return latent_shape(self.config, self.layout, height, width)

    @torch.no_grad()
    def draw(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        guidance_scale: float | None = None,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
    ) -> Any:
        """Draw pictures; the tokenizer must have been loaded by `load_tokenizer`.

        Args:
            prompt: One prompt, or B of them.
            height: Pixels; None is the size that the checkpoint was made for.
            width: Likewise.
            num_inference_steps: Steps, one forward each.
            guidance_scale: Where the checkpoint embeds it; None is the checkpoint's own. Others have it built in.
            generator: Source of the noise, one for all pictures or one a picture.
            latents: Noise (B, C, h, w) in place of the generator's.
            output_type: "pil", "np" or "pt" (in [0, 1]).

        Returns:
            B pictures.

        Raises:
            ValueError: If the checkpoint has no such size.
        """
        # The last bit of a sum may decide which expert a token goes to: pictures are to be those that training drew.
        align_weights(self)
        self.vae.requires_grad_(False)
        layout = self.layout
        height, width = height or self.default_size, width or self.default_size
        shape = latent_shape(self.config, layout, height, width)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        device = self._embedding.device
        sequence = layout.sequence(layout.condition(prompts, device), height, width)
        if latents is None:
            latents = randn_tensor((len(prompts), *shape), generator=generator, device=device, dtype=torch.float32)
        x, guidance = latents.to(device, torch.float32), None
        if self.embeds_guidance:
            scale = self.generation_config.diff_guidance_scale if guidance_scale is None else guidance_scale
            guidance = torch.full((len(prompts),), float(scale), device=device)
        scheduler = AverageVelocityScheduler(
            shift=self.generation_config.flow_shift, stochastic_sampling=self.config.stochastic_sampling
        )
        scheduler.set_timesteps(num_inference_steps, device=device)
        for t, r in scheduler.intervals:
            u = self.average_velocity(x, r.expand(len(x)), t.expand(len(x)), sequence, guidance)
            (x,) = scheduler.step(u, t, x, generator, return_dict=False)
        return VaeImageProcessor().postprocess(decode_latents(self.vae, x), output_type=output_type)


def load_tokenizer(model: Any, published: Any, directory: str) -> None:
    """Load a published model's tokenizer, so that it splits text as its files say."""
    # The older form would ask at the terminal whether it may be loaded.
    source = directory if is_newer_form(published) else AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    published.load_tokenizer(model, source)
    # transformers 5 builds tokenizers whose class has a constructor anew, from their vocabulary alone.
    file = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
    backend = getattr(model.tokenizer, "tokenizer", model.tokenizer).backend_tokenizer
    for part in ("model", "normalizer", "pre_tokenizer", "decoder"):
        setattr(backend, part, getattr(file, part))


def layout_of(model: Any, system_prompt: str | None, max_sequence_length: int) -> TokenLayout:
    """The token layout of a published model whose tokenizer is loaded."""
    return TokenLayout(
        tokenizer=model.tokenizer,
        image_processor=model.image_processor,
        config=model.config,
        sequence_template=getattr(model.generation_config, "sequence_template", "pretrain"),
        system_prompt=system_prompt,
        max_sequence_length=max_sequence_length,
    )


def latent_shape(config: Any, layout: TokenLayout, height: int, width: int) -> tuple[int, int, int]:
    """Shape (C, h, w) of the latents of an image of H x W pixels.

    Raises:
        ValueError: If the checkpoint has no such size.
    """
    layout.picture(height, width)
    vertical, horizontal = config.vae_downsample_factor
    return config.vae["latent_channels"], height // vertical, width // horizontal


def encode_latents(vae: Any, images: Tensor) -> Tensor:
    """Latents (B, C, h, w), float32, of images (B, 3, H, W) in [-1, 1]: the posterior's mean, shifted and scaled."""
    latents = vae.encode(images.to(vae.dtype)).latent_dist.mode().float()
    scale, shift = _normalisation(vae.config)
    return ((latents[:, :, 0] if latents.ndim == 5 else latents) - shift) * scale


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W), float32, about [-1, 1], of latents (B, C, h, w)."""
    scale, shift = _normalisation(vae.config)
    latents = (latents / scale + shift).to(vae.dtype)
    # Its autoencoder is one of videos, of a single frame here.
    latents = latents[:, :, None] if hasattr(vae, "ffactor_temporal") else latents
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Its `decode` would leave the work to the first process, but each has pictures of its own.
        images: Tensor = vae.decoder(latents)
    else:
        (images,) = vae.decode(latents, return_dict=False)
    return (images[:, :, -1] if images.ndim == 5 else images).float()


def _normalisation(config: Mapping[str, Any]) -> tuple[float, float]:
    return config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
