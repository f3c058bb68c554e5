"""Pipelines of diffusers that generate images in a few steps, by average velocities.

Every exported student contains a copy of this file. It imports only torch, diffusers and sibling files, and runs without this
package.
"""

import inspect
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor, nn

from .two_time import TwoTimeModel

DEFAULT_GUIDANCE_SCALE = 3.5
"""Guidance scale of transformers that embed it, unless another is given."""


def align_weights(module: nn.Module) -> None:
    """Copy weights of memory-mapped files to aligned memory, where torch allocates all other weights.

    The summation order of a matrix product depends on the alignment, and so does its last bit.
    """
    for parameter in module.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


class FewStepPipeline(DiffusionPipeline, ABC):
    """Generates images with a two-time transformer and `AverageVelocityScheduler`.

    The transformer receives the start and the end of each step. Guidance is distilled into it, so a step is one forward pass.

    Subclasses inherit this class before a stock pipeline, which provides components, loading and devices. A subclass defines
    the formats of prompts and velocities, and that of latents if its autoencoder is unusual. Training calls the same methods.
    Latents are (B, C, h, w), float32, normalised to about unit scale. Times are (B,), float32, in [0, 1]; 1 is noise.
    """

    stock_class: ClassVar[type[DiffusionPipeline]]
    """Stock pipeline of diffusers."""
    network_class: ClassVar[type[TwoTimeModel]]
    """Class of the two-time transformer."""
    condition_names: ClassVar[tuple[str, ...]]
    """Names of the results of `encode_condition`."""
    prompt_tokenizer: ClassVar[str] = "tokenizer"
    """Component whose `model_max_length` is the number of tokens that a prompt is padded to."""
    default_sequence_length: ClassVar[int] = 512
    """Default maximum of that number: the default of the stock pipeline."""
    patch_size = 2
    """Latents per side of an image token."""
    stock_passes_sigmas: ClassVar[bool] = True
    """Whether the stock pipeline passes evenly spaced sigmas to its scheduler, instead of the number of steps alone."""
    stock_without_guidance: ClassVar[dict[str, Any]] = {}
    """Components and settings that turn off the guidance of the stock pipeline, where arguments of a call cannot."""

    @abstractmethod
    def encode_condition(self, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
        """Encode B prompts to inputs of the transformer: named tensors with the batch first.

        Args:
            prompts: Prompts; the empty prompt gives the null condition of guidance.
            max_sequence_length: Number of tokens to pad to.
        """

    @abstractmethod
    def network_inputs(
        self, x_t: Tensor, condition: dict[str, Tensor], guidance_scale: Tensor | None, network: TwoTimeModel
    ) -> dict[str, Any]:
        """Arguments of the transformer, without the times.

        Args:
            x_t: Latents (B, C, h, w), with the transformer's dtype.
            condition: Result of `encode_condition`; embeddings have the transformer's dtype.
            guidance_scale: (B,), float32, if the transformer embeds it.
            network: The transformer.
        """

    def velocity_from_output(self, output: Any, height: int, width: int) -> Tensor:
        """Velocity (B, C, height, width) from the transformer's output."""
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
        """Average velocity of the network from t down to r, (B, C, h, w) in the dtype of `x_t`; the velocity at t if r is None.

        Args:
            network: A `network_class`.
            x_t: Latents (B, C, h, w).
            r: Ends (B,), or None.
            t: Starts (B,).
            condition: Result of `encode_condition`.
            guidance_scale: (B,), if the network embeds it.
            all_points: Whether to return all outputs of a policy, as in `TwoTimeModel`.
        """
        # Text encoders may have a lower precision than the transformer.
        dtype = network.dtype
        condition = {name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()}
        inputs = self.network_inputs(x_t.to(dtype), condition, guidance_scale, network)
        options = {"all_points": True} if all_points else {}
        (output,) = network(**inputs, timestep=t, timestep_r=r, return_dict=False, **options)
        return self.velocity_from_output(output, *x_t.shape[-2:]).to(x_t.dtype)

    def encode_latents(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w): the posterior's mean, shifted and scaled."""
        encoded = self.vae.encode(images.to(self.vae.dtype))
        latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        return ((latents - self._latent_shift) * self.vae.config.scaling_factor).float()

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W), float32, about [-1, 1]."""
        latents = latents / self.vae.config.scaling_factor + self._latent_shift
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    @property
    def _latent_shift(self) -> float:
        return self.vae.config.get("shift_factor") or 0.0

    @property
    def latent_channels(self) -> int:
        """Number of latent channels, C."""
        channels: int = self.vae.config.latent_channels
        return channels

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of an image of H x W pixels.

        Raises:
            ValueError: If H or W is no multiple of the autoencoder's factor times the transformer's patch size.
        """
        factor, multiple = self.vae_scale_factor, self.vae_scale_factor * self.patch_size
        if height % multiple or width % multiple:
            raise ValueError(f"images of {height} x {width} do not fit; use multiples of {multiple} pixels")
        return self.latent_channels, height // factor, width // factor

    @property
    def default_size(self) -> int:
        """Default height and width in pixels: that of the autoencoder, or the default of the stock pipeline."""
        size: int = self.vae.config.get("sample_size") or self.default_sample_size * self.vae_scale_factor
        return size

    def time_shift(self, latent_shape: tuple[int, ...]) -> float:
        """Shift of the time grid toward noise for latents (C, h, w): that of the scheduler, which may grow with their size."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        tokens = (latent_shape[-2] // self.patch_size) * (latent_shape[-1] // self.patch_size)
        mu = calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        return math.exp(mu)

    def rescale_guidance(self, guided: Tensor, v_cond: Tensor) -> Tensor:
        """The family's rescaling of a guided velocity of the teacher, given its conditional branch, (B, C, h, w) each."""
        return guided

    @classmethod
    def stock_guidance(cls, guidance_scale: float, embeds_guidance: bool) -> dict[str, Any]:
        """Guidance arguments of a teacher's stock pipeline; without embedded guidance, a scale of 1 means no guidance."""
        return {"guidance_scale": guidance_scale}

    @property
    def sequence_length(self) -> int:
        """Default number of tokens that prompts are padded to: that of the tokenizer, if the pipeline has it."""
        tokenizer = getattr(self, self.prompt_tokenizer)
        longest = self.default_sequence_length
        return longest if tokenizer is None else min(longest, unwrap_tokenizer(tokenizer).model_max_length)

    def register_modules(self, **modules: Any) -> None:
        """Register the components, so that their results equal those of training to the last bit."""
        super().register_modules(**modules)
        for name, module in modules.items():
            if not isinstance(module, nn.Module):
                continue
            align_weights(module)
            # Even under no_grad, torch may order a sum differently if weights require gradients.
            if name != "transformer":
                module.requires_grad_(False)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        max_sequence_length: int | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **condition: Tensor,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            prompt: One prompt, or B prompts. None if embeddings are given.
            height: Height in pixels; None means `default_size`.
            width: Width in pixels; None means `default_size`.
            num_inference_steps: Number of steps, one forward pass each.
            guidance_scale: Guidance scale for transformers that embed it; None means 3.5. Other transformers have built-in
                guidance, and a scale has no effect, which a warning says.
            num_images_per_prompt: Number of images per prompt, M.
            generator: Random number generator of the noise, one for all images or one per image.
            latents: Noise (B M, C, h, w), instead of noise from the generator.
            output_type: "pil", "np", "pt" (in [0, 1]) or "latent".
            return_dict: Whether to return an `ImagePipelineOutput` instead of a tuple.
            max_sequence_length: Number of tokens of a prompt; None means `sequence_length`.
            callback_on_step_end: Called after each step as `callback(pipeline, step, t, tensors)`, t in [0, 1] the start of the
                step. It returns tensors by name; they replace those of the pipeline. Setting `pipeline._interrupt = True` in
                it ends the sampling, as in stock pipelines.
            callback_on_step_end_tensor_inputs: Names of the tensors for the callback: "latents", or of `**condition`.
            **condition: Embeddings of B prompts, by the names of `encode_condition`.

        Returns:
            The images as `images`, or in a tuple.

        Raises:
            ValueError: If the image size is not supported, not exactly one of prompts and embeddings is given, an embedding is
                missing, or the callback asks for an unknown tensor.
            TypeError: If an argument is unknown, such as `negative_prompt`: guidance is built in.
        """
        self._check_arguments(condition, guidance_scale)
        if (prompt is None) == (not condition):
            raise ValueError("pass either a prompt or embeddings of prompts")
        shape = self.latent_shape(height or self.default_size, width or self.default_size)
        device = self._execution_device
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            condition = self.encode_condition(prompts, max_sequence_length or self.sequence_length)
        condition = {name: value.repeat_interleave(num_images_per_prompt, dim=0) for name, value in condition.items()}
        count = len(next(iter(condition.values())))
        # States are float32 between steps, for any precision of the transformer.
        if latents is None:
            latents = randn_tensor((count, *shape), generator=generator, device=device, dtype=torch.float32)
        x = latents.to(device, torch.float32)
        scale = DEFAULT_GUIDANCE_SCALE if guidance_scale is None else guidance_scale
        guidance = torch.full((count,), float(scale), device=device) if self.embeds_guidance else None
        if unknown := set(callback_on_step_end_tensor_inputs) - {"latents", *condition}:
            known = ", ".join(["latents", *condition])
            raise ValueError(f"callback_on_step_end_tensor_inputs has {min(unknown)!r}; choose from {known}")

        self.scheduler.set_timesteps(num_inference_steps, device=device, shift=self.time_shift(tuple(x.shape[1:])))
        self._interrupt = False
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for step, (t, r) in enumerate(self.scheduler.intervals):
                u = self.average_velocity(self.transformer, x, r.expand(count), t.expand(count), condition, guidance)
                (x,) = self.scheduler.step(u, t, x, generator, return_dict=False)
                progress_bar.update()
                if callback_on_step_end is not None:
                    tensors = {"latents": x, **condition}
                    chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, step, t, chosen) or {}
                    x, condition = tensors["latents"], {name: tensors[name] for name in condition}
                if self._interrupt:
                    break

        images = x
        if output_type != "latent":
            images = VaeImageProcessor().postprocess(self.decode_latents(x), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_arguments(self, condition: dict[str, Tensor], guidance_scale: float | None) -> None:
        names = self.condition_names
        if unknown := [name for name in condition if name not in names]:
            known = [
                name for name in inspect.signature(FewStepPipeline.__call__).parameters if name not in ("self", "condition")
            ]
            raise TypeError(
                f"{type(self).__name__} has no argument {unknown[0]!r}, since its guidance and its steps are distilled; "
                f"its arguments are {', '.join([*known, *names])}"
            )
        if condition and (missing := [name for name in names if name not in condition]):
            raise ValueError(f"{missing[0]} is missing; pass all of {', '.join(names)}, or a prompt")
        if guidance_scale not in (None, 1) and not self.embeds_guidance:
            # The frames between are `__call__` and its `torch.no_grad`. Python shows a warning once per line of the caller.
            warnings.warn(
                f"guidance_scale {guidance_scale} has no effect: the guidance of this student is built in; leave it out",
                stacklevel=4,
            )

    @property
    def embeds_guidance(self) -> bool:
        """Whether the transformer takes the guidance scale as an input."""
        return bool(self.transformer.config.get("guidance_embeds", False))


def unwrap_tokenizer(component: Any) -> Any:
    """Tokenizer of a processor, or the component itself if it is a tokenizer."""
    return getattr(component, "tokenizer", component)


def pack_latents(latents: Tensor) -> Tensor:
    """Pack latents (B, C, h, w) to tokens (B, h/2 * w/2, 4 C), each a 2 x 2 patch, in FLUX's order."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """Unpack tokens (B, N, 4 C) to latents (B, C, height, width): the inverse of `pack_latents`."""
    batch, _, width_4c = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, width_4c // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, width_4c // 4, height, width)
