"""The network of HunyuanImage 3.0 for fake tensors. The published code is in its checkpoint, and a plan does not execute it.

Names, sizes and the order of operations are those of the newer version of the published `HunyuanImage3ForCausalMM`.
"""

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32
"""Number of groups of each group normalisation."""


class TimestepEmbedder(nn.Module):
    """Layers of a time embedder, which `TwoTimeHunyuanImage3` replaces by a two-time embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequency_embedding_size = 256
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.GELU(), nn.Linear(width, width))


class RMSNorm(nn.Module):
    """RMS normalisation in float32, scaled by a weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class Expert(nn.Module):
    """A gated feed-forward layer: an expert, or the layer that all tokens share."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_and_up_proj = nn.Linear(width, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (..., D) to (..., D)."""
        up, gate = self.gate_and_up_proj(x).chunk(2, dim=-1)
        result: Tensor = self.down_proj(up * F.silu(gate))
        return result


class Gate(nn.Module):
    """The router, always in float32."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.wg = nn.Linear(width, count, bias=False, dtype=torch.float32)


class Mixture(nn.Module):
    """Submodules that `RoutedExperts` uses: router, experts and shared expert."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        inner = layer_setting(config.moe_intermediate_size, layer)
        self.moe_topk: int = layer_setting(config.moe_topk, layer)
        count = layer_setting(config.num_experts, layer)
        if config.use_mixed_mlp_moe:
            self.shared_mlp = Expert(config.hidden_size, inner * layer_setting(config.num_shared_expert, layer))
        self.gate = Gate(config.hidden_size, count)
        self.experts = nn.ModuleList(Expert(config.hidden_size, inner) for _ in range(count))


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads, self.groups, self.dim = config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, (self.heads + 2 * self.groups) * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, config.hidden_size, bias=False)
        self.query_layernorm, self.key_layernorm = RMSNorm(self.dim), RMSNorm(self.dim)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention over hidden states (B, S, D)."""
        batch, length, _ = x.shape
        share = self.heads // self.groups
        parts = self.qkv_proj(x).reshape(batch, length, self.groups, share + 2, self.dim).split([share, 1, 1], dim=3)
        query, key, value = (part.reshape(batch, length, -1, self.dim).transpose(1, 2) for part in parts)
        query, key = self.query_layernorm(_rotate(query, cos, sin)), self.key_layernorm(_rotate(key, cos, sin))
        key, value = (part.repeat_interleave(share, dim=1) for part in (key.to(value.dtype), value))
        out = F.scaled_dot_product_attention(query.to(value.dtype), key, value, attn_mask=mask)
        result: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return result


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class HunyuanImage3DecoderLayer(nn.Module):
    """A transformer block."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp: nn.Module = Mixture(config, layer)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(config.hidden_size), RMSNorm(config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor]:
        """Map hidden states (B, S, D) to a tuple of (B, S, D)."""
        x = x + self.self_attn(self.input_layernorm(x), mask, cos, sin)
        return (x + self.mlp(self.post_attention_layernorm(x)),)


class ResBlock(nn.Module):
    """Residual block of convolutions, modulated by a time embedding."""

    def __init__(self, channels: int, width: int, out: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * out))
        conv = nn.Conv2d(out, out, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(GROUPS, out), nn.SiLU(), nn.Dropout(0.0), conv)
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map features (B, C, h, w) and time embeddings (B, D) to (B, C', h, w)."""
        scale, shift = self.emb_layers(time)[:, :, None, None].chunk(2, dim=1)
        norm, *others = self.out_layers
        h = norm(self.in_layers(x)) * (1 + scale) + shift
        for layer in others:
            h = layer(h)
        result: Tensor = self.skip_connection(x) + h
        return result


class PatchEmbed(nn.Module):
    """Embeds latents as image tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, width = config.patch_embed_hidden_dim, config.hidden_size
        self.model = nn.ModuleList(
            [nn.Conv2d(config.vae["latent_channels"], hidden, 3, padding=1), ResBlock(hidden, width, width)]
        )

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, int, int]:
        """Map latents (B, C, h, w) and time embeddings (B, D) to tokens (B, h w, D), h and w."""
        x = self.model[1](self.model[0](x), time)
        return x.flatten(2).transpose(1, 2), *x.shape[-2:]


class FinalLayer(nn.Module):
    """Maps image tokens to a velocity."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, width = config.patch_embed_hidden_dim, config.hidden_size
        out = nn.Conv2d(hidden, config.vae["latent_channels"], 3, padding=1)
        self.model = nn.ModuleList(
            [ResBlock(width, width, hidden), nn.Sequential(nn.GroupNorm(GROUPS, hidden), nn.SiLU(), out)]
        )

    def forward(self, x: Tensor, time: Tensor, height: int, width: int) -> Tensor:
        """Map tokens (B, h w, D) and time embeddings (B, D) to a velocity (B, C, h, w)."""
        x = x.transpose(1, 2).reshape(len(x), -1, height, width)
        result: Tensor = self.model[1](self.model[0](x, time))
        return result


class Backbone(nn.Module):
    """Token embedding, blocks and final norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HunyuanImage3DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size)


class HunyuanImage3Model(nn.Module):
    """Replaces the published class. All sequences have one length, and their images one position.

    Args:
        config: Published configuration.
    """

    _no_split_modules: ClassVar[list[str]] = ["HunyuanImage3DecoderLayer"]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        # Modules that do not generate images, which a teacher lacks in any case.
        self.vae, self.vision_model, self.vision_aligner, self.lm_head = (nn.Identity() for _ in range(4))
        self.timestep_emb, self.time_embed, self.time_embed_2 = (TimestepEmbedder(width) for _ in range(3))
        if getattr(config, "cfg_distilled", False):
            self.guidance_emb = TimestepEmbedder(width)
        if getattr(config, "use_meanflow", False):
            self.timestep_r_emb = TimestepEmbedder(width)
        self.patch_embed, self.final_layer, self.model = PatchEmbed(config), FinalLayer(config), Backbone(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        rope_image_info: list[list[tuple[slice, tuple[int, int]]]],
        images: Tensor,
        timesteps: Tensor,
        timesteps_index: Tensor,
        timesteps_r: Tensor | None = None,
        timesteps_r_index: Tensor | None = None,
        guidance: Tensor | None = None,
        guidance_index: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """The published forward pass, in the first step of image generation."""
        (position, _shape), *_rest = rope_image_info[0]
        x = self.model.wte(input_ids)
        tokens, height, width = self.patch_embed(images, self.time_embed(timesteps))
        x[:, position] = tokens
        for embedder, values, index in (
            ("timestep_emb", timesteps, timesteps_index),
            ("guidance_emb", guidance, guidance_index),
            ("timestep_r_emb", timesteps_r, timesteps_r_index),
        ):
            if index is not None:
                x[:, int(index[0, 0])] = self.get_submodule(embedder)(values).to(x.dtype)
        # In training, the table of rotary embeddings has the length of the sequence. Its values do not change its size.
        cos = sin = torch.ones(len(x), 1, x.shape[1], self.config.attention_head_dim)
        for layer in self.model.layers:
            (x,) = layer(x, attention_mask, cos, sin)
        velocity = self.final_layer(x[:, position], self.time_embed_2(timesteps), height, width)
        return SimpleNamespace(diffusion_prediction=velocity)


def layer_setting(value: Any, layer: int) -> Any:
    """Value of a setting in a layer; the setting is one value, or a list with one per layer."""
    return value[layer] if isinstance(value, list) else value
