"""Sana.

Every exported student contains a copy of this file. It imports only torch, diffusers and sibling files, and runs without this
package.
"""

import inspect
from typing import Any, ClassVar

import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from torch import Tensor, nn

from .few_step import FewStepPipeline
from .two_time import ATTENTION, ScaledTimeProjection, TwoTimeModel

INSTRUCTION: list[str] = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
"""Default instruction before Sana's prompts."""


class TwoTimeSanaTransformer2DModel(TwoTimeModel, SanaTransformer2DModel):
    """Sana transformer with a second time input; latents and prompts are those of the stock class."""

    # Sana's feed-forward layers are convolutions.
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION

    def time_features(self, embedder: str) -> nn.Module:
        """Original features of the stock class's embedder, for times in [0, 1]."""
        parent = embedder.rpartition(".")[0]
        return ScaledTimeProjection(self.get_submodule(f"{parent}.time_proj"), 1000 * self.config.timestep_scale)

    def stock_time_features(self, embedder: str, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Features (N, F) that the stock pipeline computes for its embedder, of unrounded timesteps (N,) in [0, 1000]."""
        features: Tensor = self.get_submodule(f"{embedder.rpartition('.')[0]}.time_proj")(
            timesteps * self.config.timestep_scale
        )
        return features


class TwoTimeSanaPipeline(FewStepPipeline, SanaPipeline):
    """Sana in a few steps."""

    stock_class = SanaPipeline
    stock_passes_sigmas: ClassVar[bool] = False
    network_class = TwoTimeSanaTransformer2DModel
    condition_names: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_attention_mask")
    default_sequence_length: ClassVar[int] = 300
    patch_size = 1

    def encode_condition(self, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
        """`prompt_embeds` (B, L, D) of the language model and `prompt_attention_mask` (B, L).

        As in the stock pipeline, the empty prompt of guidance has no instruction.
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
        """Arguments of the transformer, without the times."""
        scale = None if guidance_scale is None else guidance_scale * network.config.guidance_embeds_scale
        return {
            "hidden_states": x_t,
            "encoder_hidden_states": condition["prompt_embeds"],
            "encoder_attention_mask": condition["prompt_attention_mask"],
            "guidance": scale,
        }

    @property
    def default_size(self) -> int:
        """Default height and width in pixels: those of the transformer."""
        size: int = self.transformer.config.sample_size * self.vae_scale_factor
        return size

    def time_shift(self, latent_shape: tuple[int, ...]) -> float:
        """Shift of the time grid: that of the scheduler, under a name that depends on its class."""
        config = self.scheduler.config
        return float(config.get("flow_shift") or config.get("shift", 1.0))
