"""Stable Diffusion 3 and 3.5.

Every exported student contains a copy of this file. It imports only torch, diffusers and sibling files, and runs without this
package.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from .few_step import FewStepPipeline
from .two_time import FEED_FORWARD, JOINT_ATTENTION, TwoTimeModel


class TwoTimeSD3Transformer2DModel(TwoTimeModel, SD3Transformer2DModel):
    """SD3 transformer with a second time input; latents and prompts are those of the stock class."""

    timestep_scale: ClassVar[float] = 1000.0
    stock_rounds_times: ClassVar[bool] = False
    lora_targets: ClassVar[tuple[str, ...]] = (*JOINT_ATTENTION, *FEED_FORWARD)


class TwoTimeStableDiffusion3Pipeline(FewStepPipeline, StableDiffusion3Pipeline):
    """Stable Diffusion 3 and 3.5 in a few steps, with or without the T5 encoder.

    Without it, the embeddings of its tokens are zeros, as in the stock pipeline.
    """

    stock_class = StableDiffusion3Pipeline
    stock_passes_sigmas: ClassVar[bool] = False
    network_class = TwoTimeSD3Transformer2DModel
    condition_names: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")
    prompt_tokenizer: ClassVar[str] = "tokenizer_3"
    default_sequence_length: ClassVar[int] = 256
    _optional_components: ClassVar[list[str]] = [
        *StableDiffusion3Pipeline._optional_components,
        "text_encoder_3",
        "tokenizer_3",
    ]

    def encode_condition(self, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
        """`prompt_embeds` (B, L, D) of both CLIPs and T5, and `pooled_prompt_embeds` (B, P) of both CLIPs.

        Without T5, D is the width of both CLIPs.
        """
        prompt_embeds, _, pooled, _ = self.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}

    def _get_t5_prompt_embeds(
        self, prompt: str | list[str], num_images_per_prompt: int = 1, max_sequence_length: int = 256, **options: Any
    ) -> Tensor:
        """Embeddings of T5; without it zeros (B, L, D) of the width of both CLIPs, since the transformer may not be loaded."""
        if self.text_encoder_3 is not None:
            embeds: Tensor = super()._get_t5_prompt_embeds(prompt, num_images_per_prompt, max_sequence_length, **options)
            return embeds
        count = num_images_per_prompt * (1 if isinstance(prompt, str) else len(prompt))
        width = self.text_encoder.config.hidden_size + self.text_encoder_2.config.hidden_size
        like = {"device": self._execution_device, "dtype": self.text_encoder.dtype}
        return torch.zeros(count, max_sequence_length, width, **like)

    def network_inputs(
        self, x_t: Tensor, condition: dict[str, Tensor], guidance_scale: Tensor | None, network: TwoTimeModel
    ) -> dict[str, Any]:
        """Arguments of the transformer, without the times."""
        embeds = condition["prompt_embeds"]
        width = network.config.joint_attention_dim
        return {
            "hidden_states": x_t,
            "encoder_hidden_states": F.pad(embeds, (0, width - embeds.shape[-1])) if embeds.shape[-1] < width else embeds,
            "pooled_projections": condition["pooled_prompt_embeds"],
        }
