"""Qwen-Image.

Every exported student contains a copy of this file. It imports only torch, diffusers and sibling files, and runs without this
package.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor, nn

from .few_step import FewStepPipeline, pack_latents, unpack_latents
from .policy import PolicyHead
from .two_time import FEED_FORWARD, JOINT_ATTENTION, TwoTimeModel


class TwoTimeQwenImageTransformer2DModel(TwoTimeModel, QwenImageTransformer2DModel):
    """Qwen-Image transformer with a second time input; image tokens and prompts are those of the stock class."""

    feature_scale: ClassVar[float] = 1.0
    output_layer: ClassVar[str | None] = "proj_out"
    policy_head_class: ClassVar[type[nn.Module] | None] = PolicyHead
    lora_targets: ClassVar[tuple[str, ...]] = (*JOINT_ATTENTION, *FEED_FORWARD)
    unused_modules: ClassVar[tuple[str, ...]] = ("transformer_blocks.-1.attn.to_add_out", "transformer_blocks.-1.txt_mlp")


class TwoTimeQwenImagePipeline(FewStepPipeline, QwenImagePipeline):
    """Qwen-Image in a few steps."""

    stock_class = QwenImagePipeline
    network_class = TwoTimeQwenImageTransformer2DModel
    condition_names: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_embeds_mask")

    @classmethod
    def stock_guidance(cls, guidance_scale: float, embeds_guidance: bool) -> dict[str, Any]:
        """Guidance arguments of a teacher's stock pipeline: a branch for an empty negative prompt."""
        return {} if guidance_scale == 1 else {"negative_prompt": "", "true_cfg_scale": guidance_scale}

    def encode_condition(self, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
        """`prompt_embeds` (B, L, D) of Qwen2.5-VL and `prompt_embeds_mask` (B, L), true at tokens of the prompt.

        All prompts are padded to the same length, so that batches can be joined. The mask excludes the padding from attention.
        """
        embeds, mask = self.encode_prompt(prompts, max_sequence_length=max_sequence_length)
        if mask is None:
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        padding = max_sequence_length - embeds.shape[1]
        return {"prompt_embeds": F.pad(embeds, (0, 0, 0, padding)), "prompt_embeds_mask": F.pad(mask, (0, padding)).bool()}

    def network_inputs(
        self, x_t: Tensor, condition: dict[str, Tensor], guidance_scale: Tensor | None, network: TwoTimeModel
    ) -> dict[str, Any]:
        """Arguments of the transformer, without the times."""
        return {
            "hidden_states": pack_latents(x_t),
            "encoder_hidden_states": condition["prompt_embeds"],
            "encoder_hidden_states_mask": condition["prompt_embeds_mask"],
            "img_shapes": [[(1, x_t.shape[-2] // 2, x_t.shape[-1] // 2)]] * len(x_t),
        }

    def velocity_from_output(self, output: Any, height: int, width: int) -> Tensor:
        """Velocity (B, C, height, width) from the transformer's output."""
        return unpack_latents(output, height, width)

    def rescale_guidance(self, guided: Tensor, v_cond: Tensor) -> Tensor:
        """Rescale each token of the guided velocity to its norm in the conditional branch."""
        tokens = pack_latents(guided)
        guided_norm, cond_norm = (each.norm(dim=-1, keepdim=True) for each in (tokens, pack_latents(v_cond)))
        return unpack_latents(tokens * (cond_norm / guided_norm), *v_cond.shape[-2:])

    @property
    def latent_channels(self) -> int:
        """Number of latent channels, C."""
        channels: int = self.vae.config.z_dim
        return channels

    def encode_latents(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w): the posterior's mean, normalised per channel."""
        latents = self.vae.encode(images.to(self.vae.dtype)[:, :, None]).latent_dist.mode()[:, :, 0].float()
        return (latents - self._statistic("latents_mean", latents)) / self._statistic("latents_std", latents)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W), float32, about [-1, 1]."""
        latents = latents * self._statistic("latents_std", latents) + self._statistic("latents_mean", latents)
        return self.vae.decode(latents.to(self.vae.dtype)[:, :, None], return_dict=False)[0][:, :, 0].float()

    def _statistic(self, name: str, like: Tensor) -> Tensor:
        return torch.tensor(self.vae.config[name], device=like.device)[:, None, None]
