"""The diffusers pipeline of few-step FLUX students.

This file imports torch and diffusers only: it travels with every exported student and must run without this package.
"""

from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from torch import Generator, Tensor, nn


def align_weights(module: nn.Module) -> None:
    """Give weights that lie in a memory-mapped file aligned memory of their own, where torch allocates all others.

    The order in which a matrix product is summed, and with it the last bit, depends on the alignment.
    """
    for parameter in module.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


class TwoTimeFluxPipeline(FluxPipeline):
    """FLUX in a few steps: a two-time transformer, told start and end of each step, under `AverageVelocityScheduler`.

    Guidance is distilled into the transformer, so a step is one forward.
    """

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
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        max_sequence_length: int | None = None,
    ) -> FluxPipelineOutput | tuple[Any]:
        """Draw pictures.

        Args:
            prompt: One prompt, or B of them. Leave it out where `prompt_embeds` are given.
            height: Pixels; None is the size that the autoencoder was made for.
            width: Likewise.
            num_inference_steps: Steps, one forward each.
            guidance_scale: For transformers that embed it; others have their guidance built in and ignore this.
            num_images_per_prompt: Pictures of each prompt, M.
            generator: Source of the noise, one for all pictures or one a picture.
            latents: Noise (B M, N, 4 C) in place of the generator's, packed as `FluxPipeline` packs it.
            prompt_embeds: T5 embeddings (B, L, D).
            pooled_prompt_embeds: CLIP embeddings (B, P).
            output_type: "pil", "np", "pt" (in [0, 1]) or "latent" (packed).
            return_dict: Whether to wrap the result.
            max_sequence_length: T5 tokens of a prompt; None is what the tokenizer was made for.

        Returns:
            The pictures as `images`, or in a tuple.

        Raises:
            ValueError: If the pictures' size does not fit, or inputs are missing or doubled.
        """
        height = height or self.vae.config.sample_size
        width = width or self.vae.config.sample_size
        multiple = 2 * self.vae_scale_factor
        if height % multiple or width % multiple:
            raise ValueError(f"pictures of {height} x {width} do not fit; use multiples of {multiple} pixels")
        self.check_inputs(
            prompt,
            None,
            height,
            width,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            max_sequence_length=max_sequence_length,
        )
        device = self._execution_device
        if prompt_embeds is not None and pooled_prompt_embeds is not None:
            # `encode_prompt` repeats what it encodes, and hands on what is given.
            prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
            pooled_prompt_embeds = pooled_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        prompt_embeds, pooled_prompt_embeds, text_ids = self.encode_prompt(
            prompt=prompt,
            device=device,
            num_images_per_prompt=num_images_per_prompt,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            max_sequence_length=max_sequence_length or min(512, self.tokenizer_2.model_max_length),
        )
        # Components may differ in precision: a student is float32 where its teacher's text encoders are bfloat16.
        prompt_embeds = prompt_embeds.to(self.transformer.dtype)
        pooled_prompt_embeds = pooled_prompt_embeds.to(self.transformer.dtype)
        batch_size = len(prompt_embeds)
        # States stay in float32 between steps, whatever the precision of the transformer.
        channels = self.transformer.config.in_channels // 4
        latents, image_ids = self.prepare_latents(
            batch_size, channels, height, width, torch.float32, device, generator, latents
        )
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((batch_size,), guidance_scale, device=device, dtype=torch.float32)

        # Text encoders may be kept in lower precision than the transformer.
        dtype = self.transformer.x_embedder.weight.dtype
        prompt_embeds, pooled_prompt_embeds = prompt_embeds.to(dtype), pooled_prompt_embeds.to(dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device, mu=self._shift_exponent(latents.shape[1]))
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for t, r in self.scheduler.intervals:
                (velocity,) = self.transformer(
                    hidden_states=latents.to(dtype),
                    encoder_hidden_states=prompt_embeds,
                    pooled_projections=pooled_prompt_embeds,
                    timestep=t.expand(batch_size),
                    timestep_r=r.expand(batch_size),
                    guidance=guidance,
                    img_ids=image_ids,
                    txt_ids=text_ids,
                    return_dict=False,
                )
                (latents,) = self.scheduler.step(velocity, t, latents, return_dict=False)
                progress_bar.update()

        images = latents
        if output_type != "latent":
            latents = self._unpack_latents(latents, height, width, self.vae_scale_factor)
            latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
            images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return FluxPipelineOutput(images=images) if return_dict else (images,)

    def _shift_exponent(self, tokens: int) -> float | None:
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return None
        mu: float = calculate_shift(
            tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        return mu
