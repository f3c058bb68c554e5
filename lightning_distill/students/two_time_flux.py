"""FLUX.1: dev, lite and schnell-type pipelines.

Every exported student contains a copy of this file. It imports only torch, diffusers and sibling files, and runs without this
package.
"""

from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from .few_step import FewStepPipeline, pack_latents, unpack_latents
from .policy import PolicyHead
from .two_time import FEED_FORWARD, JOINT_ATTENTION, TwoTimeModel


class TwoTimeFluxTransformer2DModel(TwoTimeModel, FluxTransformer2DModel):
    """FLUX transformer with a second time input; image tokens and prompts are those of the stock class."""

    output_layer: ClassVar[str | None] = "proj_out"
    policy_head_class: ClassVar[type[nn.Module] | None] = PolicyHead
    lora_targets: ClassVar[tuple[str, ...]] = (*JOINT_ATTENTION, *FEED_FORWARD, "proj_mlp", "proj_out")


class TwoTimeFluxPipeline(FewStepPipeline, FluxPipeline):
    """FLUX.1 in a few steps."""

    stock_class = FluxPipeline
    network_class = TwoTimeFluxTransformer2DModel
    condition_names: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")
    prompt_tokenizer: ClassVar[str] = "tokenizer_2"

    @classmethod
    def stock_guidance(cls, guidance_scale: float, embeds_guidance: bool) -> dict[str, Any]:
        """Guidance arguments of a teacher's stock pipeline: an input, or a branch for an empty negative prompt."""
        if embeds_guidance:
            return {"guidance_scale": guidance_scale}
        return {} if guidance_scale == 1 else {"negative_prompt": "", "true_cfg_scale": guidance_scale}

    def encode_condition(self, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
        """`prompt_embeds` (B, L, D) of T5 and `pooled_prompt_embeds` (B, P) of CLIP."""
        prompt_embeds, pooled, _ = self.encode_prompt(prompts, None, max_sequence_length=max_sequence_length)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}

    def network_inputs(
        self, x_t: Tensor, condition: dict[str, Tensor], guidance_scale: Tensor | None, network: TwoTimeModel
    ) -> dict[str, Any]:
        """Arguments of the transformer, without the times."""
        rows, columns = x_t.shape[-2] // 2, x_t.shape[-1] // 2
        return {
            "hidden_states": pack_latents(x_t),
            "encoder_hidden_states": condition["prompt_embeds"],
            "pooled_projections": condition["pooled_prompt_embeds"],
            "guidance": guidance_scale,
            "img_ids": image_ids(rows, columns, x_t.device),
            "txt_ids": torch.zeros(condition["prompt_embeds"].shape[1], 3, device=x_t.device),
        }

    def velocity_from_output(self, output: Any, height: int, width: int) -> Tensor:
        """Velocity (B, C, height, width) from the transformer's output."""
        return unpack_latents(output, height, width)


def image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """Positions (rows * columns, 3) of image tokens: zero, row, column."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)[None]
    return ids.reshape(-1, 3)
