"""FLUX.2, dev and klein.

Every exported student contains a copy of this file. It imports only torch, diffusers and sibling files, and runs without this
package.
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
"""Number of steps for FLUX.2's time shift, which depends on it. Students are trained on a single grid, the teacher's."""


class TwoTimeFlux2Transformer2DModel(TwoTimeModel, Flux2Transformer2DModel):
    """FLUX.2 transformer with a second time input; image tokens and prompts are those of the stock class."""

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
    """Shared base of the FLUX.2 pipelines.

    Latents are patched 2 x 2 and normalised by the autoencoder's running statistics.
    """

    network_class = TwoTimeFlux2Transformer2DModel
    condition_names: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    patch_size = 1

    def encode_condition(self, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
        """`prompt_embeds` (B, L, D) of three layers of the language model."""
        prompt_embeds, _ = self.encode_prompt(prompts, max_sequence_length=max_sequence_length)
        return {"prompt_embeds": prompt_embeds}

    def network_inputs(
        self, x_t: Tensor, condition: dict[str, Tensor], guidance_scale: Tensor | None, network: TwoTimeModel
    ) -> dict[str, Any]:
        """Arguments of the transformer, without the times."""
        length, (height, width) = condition["prompt_embeds"].shape[1], x_t.shape[-2:]
        return {
            "hidden_states": x_t.flatten(2).mT,
            "encoder_hidden_states": condition["prompt_embeds"],
            "guidance": guidance_scale,
            "img_ids": positions(1, height, width, 1, x_t.device),
            "txt_ids": positions(1, 1, 1, length, x_t.device),
        }

    def velocity_from_output(self, output: Any, height: int, width: int) -> Tensor:
        """Velocity (B, C, height, width) from the transformer's output."""
        tokens: Tensor = output
        return tokens.mT.unflatten(2, (height, width))

    @property
    def latent_channels(self) -> int:
        """Number of latent channels, C: those of a 2 x 2 patch of the autoencoder's latents."""
        channels: int = 4 * self.vae.config.latent_channels
        return channels

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of an image of H x W pixels.

        Raises:
            ValueError: If H or W is no multiple of twice the autoencoder's factor.
        """
        factor = 2 * self.vae_scale_factor
        if height % factor or width % factor:
            raise ValueError(f"images of {height} x {width} do not fit; use multiples of {factor} pixels")
        return self.latent_channels, height // factor, width // factor

    def encode_latents(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w)."""
        latents = self._patchify_latents(self.vae.encode(images.to(self.vae.dtype)).latent_dist.mode().float())
        mean, std = self._statistics()
        return (latents - mean) / std

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W), float32, about [-1, 1]."""
        mean, std = self._statistics()
        latents = self._unpatchify_latents(latents * std + mean)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    def _statistics(self) -> tuple[Tensor, Tensor]:
        mean, variance = (part.float()[:, None, None] for part in (self.vae.bn.running_mean, self.vae.bn.running_var))
        return mean, (variance + self.vae.config.batch_norm_eps).sqrt()

    def time_shift(self, latent_shape: tuple[int, ...]) -> float:
        """Shift of the time grid: FLUX.2's, for `NOMINAL_STEPS`."""
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
    stock_without_guidance: ClassVar[dict[str, Any]] = {"is_distilled": True}


def positions(time: int, rows: int, columns: int, length: int, device: torch.device) -> Tensor:
    """Positions (time * rows * columns * length, 4) of tokens."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in (time, rows, columns, length)))
