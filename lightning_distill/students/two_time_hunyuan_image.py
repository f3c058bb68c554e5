"""HunyuanImage 2.1, base and distilled.

Every exported student contains a copy of this file. It imports only torch, diffusers and sibling files, and runs without this
package.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from diffusers import HunyuanImagePipeline, HunyuanImageTransformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .few_step import FewStepPipeline
from .two_time import FEED_FORWARD, JOINT_ATTENTION, TwoTimeEmbedding, TwoTimeModel


def checkpointed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a block under activation checkpointing."""
    return checkpoint(block.__call__, *args, use_reentrant=False, **kwargs)


class EndTimeEmbedding(TwoTimeEmbedding):
    """Embedding of r in the distilled checkpoints (`use_meanflow`)."""

    embeds_end: ClassVar[bool] = True

    def __init__(
        self,
        like: Any,
        features: nn.Module,
        interval_embedding: str,
        time_frequency_bound: float | None,
        interval_frequency_bound: float,
    ) -> None:
        super().__init__(like, features, "none", time_frequency_bound, interval_frequency_bound)

    def embed_times(self, t: Tensor, r: Tensor) -> Tensor:
        """Embed r (B,) to (B, D)."""
        return super().embed_times(r, r)


class TwoTimeHunyuanImageTransformer2DModel(TwoTimeModel, HunyuanImageTransformer2DModel):
    """HunyuanImage transformer with a second time input; latents and prompts are those of the stock class.

    A checkpoint with `use_meanflow` has a second time input already, :math:`(E_t(t) + E_r(r)) / 2`. Training continues from it.
    """

    _keep_in_fp32_modules: ClassVar[list[str]] = ["timestep_embedder", "timestep_embedder_r"]
    timestep_scale: ClassVar[float] = 1000.0
    lora_targets: ClassVar[tuple[str, ...]] = (*JOINT_ATTENTION, *FEED_FORWARD, "proj_mlp", "proj_out")

    def embedder_class(self, name: str) -> type[TwoTimeEmbedding] | None:
        """Class that replaces a module with this name in its parent, or None."""
        return EndTimeEmbedding if name == "timestep_embedder_r" else super().embedder_class(name)

    def stock_time_arguments(self, t: Tensor, r: Tensor) -> dict[str, Tensor]:
        """Convert times to arguments of the stock forward."""
        end = {"timestep_r": r * self.timestep_scale} if self.config.use_meanflow else {}
        # The stock embedding has the dtype of its times.
        return {name: times.to(self.dtype) for name, times in (super().stock_time_arguments(t, r) | end).items()}

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """Enable activation checkpointing of blocks.

        The default of diffusers does not accept the keyword arguments of these blocks.
        """
        super().enable_gradient_checkpointing(gradient_checkpointing_func or checkpointed)


class TwoTimeHunyuanImagePipeline(FewStepPipeline, HunyuanImagePipeline):
    """HunyuanImage 2.1 in a few steps."""

    stock_class = HunyuanImagePipeline
    stock_without_guidance: ClassVar[dict[str, Any]] = {"guider": None, "ocr_guider": None}
    network_class = TwoTimeHunyuanImageTransformer2DModel
    condition_names: ClassVar[tuple[str, ...]] = (
        "prompt_embeds",
        "prompt_embeds_mask",
        "prompt_embeds_2",
        "prompt_embeds_mask_2",
    )
    default_sequence_length: ClassVar[int] = 1000
    patch_size = 1

    @classmethod
    def stock_guidance(cls, guidance_scale: float, embeds_guidance: bool) -> dict[str, Any]:
        """Guidance arguments of a teacher's stock pipeline: an input, or none if its guidance component is used unchanged."""
        return {"distilled_guidance_scale": guidance_scale} if embeds_guidance else {}

    def encode_condition(self, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
        """Embeddings (B, L, D) of Qwen2.5-VL, and of ByT5 for quoted text in the prompts, each with its mask (B, L)."""
        embeds, mask = self._get_qwen_prompt_embeds(
            self.tokenizer,
            self.text_encoder,
            prompts,
            tokenizer_max_length=max_sequence_length,
            template=self.prompt_template_encode,
            drop_idx=self.prompt_template_encode_start_idx,
        )
        embeds, mask, glyph_embeds, glyph_mask = self.encode_prompt(
            prompts, batch_size=len(prompts), prompt_embeds=embeds, prompt_embeds_mask=mask
        )
        return {
            "prompt_embeds": embeds,
            "prompt_embeds_mask": mask,
            "prompt_embeds_2": glyph_embeds,
            "prompt_embeds_mask_2": glyph_mask,
        }

    def network_inputs(
        self, x_t: Tensor, condition: dict[str, Tensor], guidance_scale: Tensor | None, network: TwoTimeModel
    ) -> dict[str, Any]:
        """Arguments of the transformer, without the times."""
        return {
            "hidden_states": x_t,
            "encoder_hidden_states": condition["prompt_embeds"],
            "encoder_attention_mask": condition["prompt_embeds_mask"],
            "encoder_hidden_states_2": condition["prompt_embeds_2"],
            "encoder_attention_mask_2": condition["prompt_embeds_mask_2"],
            "guidance": None if guidance_scale is None else guidance_scale.to(x_t.dtype) * 1000,
        }

    @property
    def default_size(self) -> int:
        """Default height and width in pixels, as in the stock pipeline."""
        size: int = self.default_sample_size * self.vae_scale_factor
        return size
