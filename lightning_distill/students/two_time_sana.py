"""Sana.

This file imports torch, diffusers and siblings that travel with it: it is part of every exported student and must run without
this package.
"""

import inspect
from typing import Any, ClassVar

from diffusers import SanaPipeline, SanaTransformer2DModel
from torch import Tensor, nn

from .few_step import FewStepPipeline
from .two_time import ATTENTION, ScaledTimeProjection, TwoTimeModel

INSTRUCTION: list[str] = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
"""What Sana's prompts are preceded by, unless told otherwise."""


class TwoTimeSanaTransformer2DModel(TwoTimeModel, SanaTransformer2DModel):
    """Sana transformer with a second time input; latents and prompts go in as in the stock one."""

    # Its feed-forward layers are convolutions.
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION

    def own_features(self, embedder: str) -> nn.Module:
        """The features of times in [0, 1] that the stock class gives to its embedder."""
        parent = embedder.rpartition(".")[0]
        return ScaledTimeProjection(self.get_submodule(f"{parent}.time_proj"), 1000 * self.config.timestep_scale)


class TwoTimeSanaPipeline(FewStepPipeline, SanaPipeline):
    """Sana in a few steps."""

    stock_class = SanaPipeline
    network_class = TwoTimeSanaTransformer2DModel
    default_sequence_length: ClassVar[int] = 300
    patch_size = 1

    def encode_condition(self, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
        """`prompt_embeds` (B, L, D) of the language model and `prompt_attention_mask` (B, L).

        As in the stock pipeline, the empty prompt of guidance goes without the instruction.
        """

        def encode(prompts: list[str], instruction: list[str] | None) -> tuple[Tensor, Tensor]:
            embeds, mask, _, _ = self.encode_prompt(
                prompts,
                do_classifier_free_guidance=False,
                max_sequence_length=max_sequence_length,
                complex_human_instruction=instruction,
            )
            return embeds, mask

        embeds, mask = encode(prompts, INSTRUCTION)
        if empty := [i for i, prompt in enumerate(prompts) if not prompt]:
            embeds[empty], mask[empty] = encode([""] * len(empty), None)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def network_inputs(
        self, x_t: Tensor, condition: dict[str, Tensor], guidance_scale: Tensor | None, network: TwoTimeModel
    ) -> dict[str, Any]:
        """Arguments of the transformer, but for the times."""
        scale = None if guidance_scale is None else guidance_scale * network.config.guidance_embeds_scale
        return {
            "hidden_states": x_t,
            "encoder_hidden_states": condition["prompt_embeds"],
            "encoder_attention_mask": condition["prompt_attention_mask"],
            "guidance": scale,
        }

    @property
    def default_size(self) -> int:
        """Pixels of a side where none are asked for: what the transformer was made for."""
        size: int = self.transformer.config.sample_size * self.vae_scale_factor
        return size

    def time_shift(self, latent_shape: tuple[int, ...]) -> float:
        """The scheduler's shift, whose name depends on its kind."""
        config = self.scheduler.config
        return float(config.get("flow_shift") or config.get("shift", 1.0))
