"""HunyuanImage 2.1, base and distilled.

This file imports torch, diffusers and siblings that travel with it: it is part of every exported student and must run without
this package.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from diffusers import HunyuanImagePipeline, HunyuanImageTransformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .few_step import FewStepPipeline
from .two_time import FEED_FORWARD, JOINT_ATTENTION, TwoTimeEmbedding, TwoTimeModel


def checkpointed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a block, and again in the backward pass."""
    return checkpoint(block.__call__, *args, use_reentrant=False, **kwargs)


class EndTimeEmbedding(TwoTimeEmbedding):
    """The embedding of r that the distilled checkpoints have of their own (`use_meanflow`)."""

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
        """The embedding (B, D) of r (B,)."""
        return super().embed_times(r, r)


class TwoTimeHunyuanImageTransformer2DModel(TwoTimeModel, HunyuanImageTransformer2DModel):
    r"""HunyuanImage transformer with a second time input; latents and prompts go in as in the stock one.

    With `use_meanflow` it has one of its own, :math:`(E_t(t) + E_r(r)) / 2`, and is trained on from there.
    """

    _keep_in_fp32_modules: ClassVar[list[str]] = ["timestep_embedder", "timestep_embedder_r"]
    timestep_scale: ClassVar[float] = 1000.0
    lora_targets: ClassVar[tuple[str, ...]] = (*JOINT_ATTENTION, *FEED_FORWARD, "proj_mlp", "proj_out")

    def embedding_of(self, name: str) -> type[TwoTimeEmbedding] | None:
        """What replaces a module of this name within its parent; None leaves it."""
        return EndTimeEmbedding if name == "timestep_embedder_r" else super().embedding_of(name)

    def stock_times(self, t: Tensor, r: Tensor) -> dict[str, Tensor]:
        """Times as arguments of the stock forward."""
        own = {"timestep_r": r * self.timestep_scale} if self.config.use_meanflow else {}
        # The stock embedding is of the precision of its times.
        return {name: times.to(self.dtype) for name, times in (super().stock_times(t, r) | own).items()}

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """Run blocks again in the backward pass; diffusers' default does not take the keywords that these blocks are given."""
        super().enable_gradient_checkpointing(gradient_checkpointing_func or checkpointed)


class TwoTimeHunyuanImagePipeline(FewStepPipeline, HunyuanImagePipeline):
    """HunyuanImage 2.1 in a few steps."""

    stock_class = HunyuanImagePipeline
    network_class = TwoTimeHunyuanImageTransformer2DModel
    default_sequence_length: ClassVar[int] = 1000
    patch_size = 1

    @classmethod
    def stock_guidance(cls, guidance_scale: float, embeds_guidance: bool) -> dict[str, Any]:
        """Arguments by which the stock pipeline guides a teacher: an input, or its own component, which they do not change."""
        return {"distilled_guidance_scale": guidance_scale} if embeds_guidance else {}

    def encode_condition(self, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
        """Embeddings (B, L, D) of Qwen2.5-VL and, of quoted text in the prompts, ByT5, each with its mask (B, L)."""
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
        """Arguments of the transformer, but for the times."""
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
        """Pixels of a side where none are asked for: the stock pipeline's default."""
        size: int = self.default_sample_size * self.vae_scale_factor
        return size
