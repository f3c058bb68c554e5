"""Stable Diffusion 3 and 3.5.

Every exported student contains a copy of this file. It imports only torch, diffusers and sibling files, and runs without this
package.
"""

from typing import Any, ClassVar

from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from .few_step import FewStepPipeline
from .two_time import FEED_FORWARD, JOINT_ATTENTION, TwoTimeModel


class TwoTimeSD3Transformer2DModel(TwoTimeModel, SD3Transformer2DModel):
    """SD3 transformer with a second time input; latents and prompts are those of the stock class."""

    timestep_scale: ClassVar[float] = 1000.0
    lora_targets: ClassVar[tuple[str, ...]] = (*JOINT_ATTENTION, *FEED_FORWARD)


class TwoTimeStableDiffusion3Pipeline(FewStepPipeline, StableDiffusion3Pipeline):
    """Stable Diffusion 3 and 3.5 in a few steps."""

    stock_class = StableDiffusion3Pipeline
    network_class = TwoTimeSD3Transformer2DModel
    prompt_tokenizer: ClassVar[str] = "tokenizer_3"
    default_sequence_length: ClassVar[int] = 256

    def encode_condition(self, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
        """`prompt_embeds` (B, L, D) of both CLIPs and T5, and `pooled_prompt_embeds` (B, P) of both CLIPs."""
        prompt_embeds, _, pooled, _ = self.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}

    def network_inputs(
        self, x_t: Tensor, condition: dict[str, Tensor], guidance_scale: Tensor | None, network: TwoTimeModel
    ) -> dict[str, Any]:
        """Arguments of the transformer, without the times."""
        return {
            "hidden_states": x_t,
            "encoder_hidden_states": condition["prompt_embeds"],
            "pooled_projections": condition["pooled_prompt_embeds"],
        }
