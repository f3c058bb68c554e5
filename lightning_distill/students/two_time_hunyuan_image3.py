"""HunyuanImage 3.0, for both published versions of its code.

The published code is not part of diffusers or transformers. The checkpoint contains it, and the classes here are mixed into its
model class.

Every exported student contains a copy of this file. It imports only torch, diffusers and sibling files, and runs without this
package.
"""

import functools
import inspect
import re
import sys
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from .expert_routing import RoutedExperts, checkpointed
from .hunyuan_image3_layout import Sequence
from .two_time import ScaledTimeProjection, TwoTimeEmbedding, at_least_float32

INTERVAL_FREQUENCY_BOUND = 6.2832


class HunyuanImage3TimeEmbedding(TwoTimeEmbedding):
    """`TwoTimeEmbedding` with the stock embedder's weight names and activation."""

    def __init__(self, like: Any, features: nn.Module, interval_embedding: str, *bounds: Any) -> None:
        first, activation, last = like.mlp
        stock = TimestepEmbedding(first.in_features, first.out_features, out_dim=last.out_features)
        super().__init__(stock, features, interval_embedding, *bounds)
        self.mlp = nn.Sequential(self.linear_1, activation, self.linear_2)
        del self.linear_1, self.act, self.linear_2
        if self.interval_embedder is not None and interval_embedding == "clone":
            self.interval_embedder.act = activation

    @property
    def layers(self) -> tuple[nn.Linear, nn.Module, nn.Linear]:
        """First layer, activation and last layer."""
        first, activation, last = self.mlp
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        return first, activation, last


class EndTimeEmbedding(HunyuanImage3TimeEmbedding):
    """Embedding of r in checkpoints with `use_meanflow`."""

    def __init__(self, like: Any, features: nn.Module, interval_embedding: str, *bounds: Any) -> None:
        super().__init__(like, features, "none", *bounds)

    def embed_times(self, t: Tensor, r: Tensor) -> Tensor:
        """Embed r (B,) to (B, D)."""
        return super().embed_times(r, r)


class GuidanceEmbedding(HunyuanImage3TimeEmbedding):
    """Embedding of the guidance scale, which `times` contains instead of times."""

    def __init__(self, like: Any, features: nn.Module, interval_embedding: str, *bounds: Any) -> None:
        super().__init__(like, features, "none", None, INTERVAL_FREQUENCY_BOUND)


EMBEDDERS: dict[str, type[HunyuanImage3TimeEmbedding]] = {
    "timestep_emb": HunyuanImage3TimeEmbedding,
    "time_embed": HunyuanImage3TimeEmbedding,
    "time_embed_2": HunyuanImage3TimeEmbedding,
    "timestep_r_emb": EndTimeEmbedding,
    "guidance_emb": GuidanceEmbedding,
}
"""Embedding classes by their names in the published model."""


class TwoTimeHunyuanImage3(nn.Module):
    """Image-generating part of HunyuanImage 3.0, with float32 time embeddings and, for a student, a second time input.

    Inherit it before the published `HunyuanImage3ForCausalMM`, whose forward it uses. Two-time embeddings replace its time
    embedders: that of the ``<timestep>`` token, and those of the convolutions before and after the transformer. A checkpoint
    with `use_meanflow` has a token for r already, and training continues from it. `RoutedExperts` replace the mixtures of
    experts. Modules without a role in image generation are removed: autoencoder, image encoder, norm and head of the language
    model.

    Args:
        config: Configuration of the published code. Its `interval_embedding`, `time_frequency_bound` and
            `interval_frequency_bound` are those of `TwoTimeModel`. Without them this is a network of t alone.
        *args: Arguments of the published class.
        **kwargs: Keyword arguments of the published class.
    """

    published: ClassVar[type[nn.Module]]
    """The published class."""
    config: Any
    removed_modules: ClassVar[tuple[str, ...]] = ("vae", "vision_model", "vision_aligner", "model.ln_f", "lm_head")
    """Modules of the published model that this network lacks."""
    lora_targets: ClassVar[tuple[str, ...]] = ("self_attn.qkv_proj", "self_attn.o_proj")
    """LoRA targets: the linear layers that process every token."""
    _repeated_blocks: ClassVar[list[str]] = ["HunyuanImage3DecoderLayer"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = list(EMBEDDERS)
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [rf"^{re.escape(name)}\." for name in removed_modules]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for parent, _, name in (name.rpartition(".") for name in self.removed_modules):
            delattr(self.get_submodule(parent), name)
        settings = (
            getattr(config, "interval_embedding", "none"),
            getattr(config, "time_frequency_bound", None),
            getattr(config, "interval_frequency_bound", INTERVAL_FREQUENCY_BOUND),
        )
        for name, kind in EMBEDDERS.items():
            if (stock := getattr(self, name, None)) is not None:
                channels = stock.frequency_embedding_size
                scale = 1.0 if kind is GuidanceEmbedding else 1000.0
                features = ScaledTimeProjection(Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0), scale)
                setattr(self, name, kind(stock, features, *settings))
        for layer in self.blocks:
            if hasattr(layer.mlp, "experts"):
                layer.mlp = RoutedExperts(layer.mlp)
        self.get_submodule("patch_embed").register_forward_hook(_cast_to_sequence_dtype)
        # The newer forward reads this attribute, which only its `generate` sets.
        self.post_token_len = None

    @property
    def blocks(self) -> Any:
        """The repeated decoder layers."""
        return self.get_submodule("model.layers")

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the sequence; time embeddings are always float32."""
        return self._embedding.dtype

    @property
    def _embedding(self) -> Tensor:
        # Not by attribute name, because ZeRO-3 would gather the parameter.
        return next(self.get_submodule("model.wte").parameters())

    @property
    def timestep_embedders(self) -> list[TwoTimeEmbedding]:
        """All embedders of times, without that of the guidance scale."""
        found = (getattr(self, name, None) for name, kind in EMBEDDERS.items() if kind is not GuidanceEmbedding)
        return [embedder for embedder in found if embedder is not None]

    @property
    def embeds_guidance(self) -> bool:
        """Whether the model takes the guidance scale as an input."""
        return bool(getattr(self.config, "cfg_distilled", False))

    def reset_interval_embedding(self) -> None:
        """Initialise the interval input: without effect, or as a copy of the timestep embedder."""
        for embedder in self.timestep_embedders:
            embedder.reset_interval_embedding(clone=self.config.interval_embedding == "clone")

    def enable_gradient_checkpointing(self) -> None:
        """Enable activation checkpointing of blocks with frozen routing; the published code does not support it."""
        for layer in self.blocks:
            layer.forward = functools.partial(checkpointed, layer.forward)

    def average_velocity(
        self, x_t: Tensor, r: Tensor | None, t: Tensor, sequence: Sequence, guidance_scale: Tensor | None
    ) -> Tensor:
        """Average velocity from t down to r, (B, C, h, w) in the dtype of `x_t`; the velocity at t if r is None.

        Args:
            x_t: Latents (B, C, h, w).
            r: Ends (B,) in [0, 1], or None.
            t: Starts (B,) in [0, 1]; 1 is noise.
            sequence: Sequences of `TokenLayout`, for images of the latents' size.
            guidance_scale: (B,), if the model embeds it.
        """
        t = at_least_float32(t)
        r = t if r is None else at_least_float32(r)
        embedders, guidance = self.timestep_embedders, getattr(self, "guidance_emb", None)
        for embedder in embedders:
            embedder.times = t, r
        if guidance is not None:
            assert guidance_scale is not None
            # The published pipeline rounds the scale to bfloat16: 2500 becomes 2496, which has another embedding.
            rounded = (1000 * guidance_scale).to(torch.bfloat16).to(t.dtype)
            guidance.times = rounded, rounded
        try:
            output = self(**self._arguments(x_t, r, t, sequence))
        finally:
            for embedder in embedders:
                embedder.times = None
            if guidance is not None:
                guidance.times = None
        velocity: Tensor = output.diffusion_prediction
        return velocity.to(x_t.dtype)

    def _arguments(self, x_t: Tensor, r: Tensor, t: Tensor, sequence: Sequence) -> dict[str, Any]:
        """Arguments of the published forward, for its version of the code."""
        # Embeddings have the dtype of their times, which must be that of the sequence.
        dtype = self.dtype
        times, ends = (1000 * t).to(dtype), (1000 * r).to(dtype)
        arguments = {
            "input_ids": sequence.input_ids,
            "attention_mask": sequence.attention_mask,
            "position_ids": sequence.position_ids,
            "images": x_t.to(dtype),
            "image_mask": sequence.image_mask,
            "mode": "gen_image",
            "first_step": True,
            "use_cache": False,
        }
        if is_newer_version(self.published):
            arguments |= {
                "rope_image_info": sequence.rope_image_info,
                "timesteps": times,
                "timesteps_index": sequence.timestep_index,
            }
            if sequence.timestep_r_index is not None:
                arguments |= {"timesteps_r": ends, "timesteps_r_index": sequence.timestep_r_index}
            if sequence.guidance_index is not None:
                arguments |= {"guidance": times, "guidance_index": sequence.guidance_index}
            return arguments
        rope = vars(sys.modules[self.published.__module__])["build_batch_2d_rope"](
            image_infos=sequence.rope_image_info,
            seq_len=sequence.input_ids.shape[1],
            n_elem=self.config.attention_head_dim,
            device=sequence.input_ids.device,
            base=self.config.rope_theta,
        )
        return arguments | {
            "custom_pos_emb": rope,
            "timestep": times,
            "gen_timestep_scatter_index": sequence.timestep_index,
        }


def _cast_to_sequence_dtype(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast image tokens to the dtype of the sequence that they are written into; autocast may have lowered their dtype."""
    tokens, *shape = output
    return tokens.to(inputs[1].dtype), *shape


def is_newer_version(published: type[nn.Module]) -> bool:
    """Whether a published class is of the newer version, whose forward has `timesteps`; the older version has `timestep`."""
    return "timesteps" in inspect.signature(published.forward).parameters
