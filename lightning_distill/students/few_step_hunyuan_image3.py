"""HunyuanImage 3.0 in a few steps: prompts to tokens, latents to images, and the sampler of exported students.

Every exported student contains a copy of this file. It imports only torch, diffusers, transformers and sibling files, and runs
without this package.
"""

import warnings
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
from .two_time_hunyuan_image3 import TwoTimeHunyuanImage3, is_newer_version


class FewStepHunyuanImage3(TwoTimeHunyuanImage3):
    """A full student that generates images in a few steps; exported students are loaded as this class."""

    removed_modules: ClassVar[tuple[str, ...]] = ()
    vae: Any
    tokenizer: Any
    image_processor: Any
    generation_config: Any

    def load_tokenizer(self, tokenizer: str) -> None:
        """Load the tokenizer from the student's directory."""
        load_tokenizer(self, self.published, tokenizer)

    @property
    def layout(self) -> TokenLayout:
        """Token layout of prompts and images."""
        return token_layout(self, self.config.system_prompt, self.config.max_sequence_length)

    @property
    def default_size(self) -> int:
        """Default height and width in pixels: the base size of the checkpoint."""
        size: int = self.config.image_base_size
        return size

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of an image of H x W pixels.

        Raises:
            ValueError: If the checkpoint does not support this size.
        """
        return latent_shape(self.config, self.layout, height, width)

    @torch.no_grad()
    def sample_images(
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
        """Generate images; call `load_tokenizer` first.

        Args:
            prompt: One prompt, or B prompts.
            height: Height in pixels; None means `default_size`.
            width: Width in pixels; None means `default_size`.
            num_inference_steps: Number of steps, one forward pass each.
            guidance_scale: Guidance scale for checkpoints that embed it; None means the checkpoint's default. Other checkpoints
                have built-in guidance, and a scale has no effect, which a warning says.
            generator: Random number generator of the noise, one for all images or one per image.
            latents: Noise (B, C, h, w), instead of noise from the generator.
            output_type: "pil", "np" or "pt" (in [0, 1]).

        Returns:
            B images.

        Raises:
            ValueError: If the checkpoint does not support this size.
        """
        # The last bit of a sum may decide a token's expert. Images must equal those of training, so weights are aligned.
        align_weights(self)
        self.vae.requires_grad_(False)
        if guidance_scale not in (None, 1) and not self.embeds_guidance:
            warnings.warn(
                f"guidance_scale {guidance_scale} has no effect: the guidance of this student is built in; leave it out",
                stacklevel=3,
            )
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
    """Load a published model's tokenizer, with the text splitting that its files define."""
    # The older version would prompt for permission at the terminal.
    source = directory if is_newer_version(published) else AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    published.load_tokenizer(model, source)
    # transformers 5 rebuilds a tokenizer whose class has a constructor, from its vocabulary alone.
    file = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
    backend = getattr(model.tokenizer, "tokenizer", model.tokenizer).backend_tokenizer
    for part in ("model", "normalizer", "pre_tokenizer", "decoder"):
        setattr(backend, part, getattr(file, part))


def token_layout(model: Any, system_prompt: str | None, max_sequence_length: int) -> TokenLayout:
    """Token layout of a published model with a loaded tokenizer."""
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
        ValueError: If the checkpoint does not support this size.
    """
    layout.image_tokens(height, width)
    vertical, horizontal = config.vae_downsample_factor
    return config.vae["latent_channels"], height // vertical, width // horizontal


def encode_latents(vae: Any, images: Tensor) -> Tensor:
    """Encode images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w), float32: the posterior's mean, shifted and scaled."""
    latents = vae.encode(images.to(vae.dtype)).latent_dist.mode().float()
    scale, shift = _normalisation(vae.config)
    return ((latents[:, :, 0] if latents.ndim == 5 else latents) - shift) * scale


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents (B, C, h, w) to images (B, 3, H, W), float32, about [-1, 1]."""
    scale, shift = _normalisation(vae.config)
    latents = (latents / scale + shift).to(vae.dtype)
    # The autoencoder is that of a video model; an image is a single frame.
    latents = latents[:, :, None] if hasattr(vae, "ffactor_temporal") else latents
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # `vae.decode` would run on the first process only, but each process has different images.
        images: Tensor = vae.decoder(latents)
    else:
        (images,) = vae.decode(latents, return_dict=False)
    return (images[:, :, -1] if images.ndim == 5 else images).float()


def _normalisation(config: Mapping[str, Any]) -> tuple[float, float]:
    return config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
