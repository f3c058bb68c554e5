"""The shapes of HunyuanImage 3.0, whose own code comes with its checkpoint and is not run for a plan.

Names, sizes and the order of operations are those of the published `HunyuanImage3ForCausalMM`, in its newer form.
"""

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32
"""Of the channels that are normalised together."""


class TimestepEmbedder(nn.Module):
    """Of which `TwoTimeHunyuanImage3` makes its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequency_embedding_size = 256
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.GELU(), nn.Linear(width, width))


class RMSNorm(nn.Module):
    """In float32, times its weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Of the last dimension."""
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class Expert(nn.Module):
    """A gated layer, of a token's experts or shared by all tokens."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_and_up_proj = nn.Linear(width, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of tokens (..., D)."""
        up, gate = self.gate_and_up_proj(x).chunk(2, dim=-1)
        result: Tensor = self.down_proj(up * F.silu(gate))
        return result


class Gate(nn.Module):
    """The router, float32 in any case."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.wg = nn.Linear(width, count, bias=False, dtype=torch.float32)


class Mixture(nn.Module):
    """The parts of which `RoutedExperts` is made."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        inner = of_layer(config.moe_intermediate_size, layer)
        self.moe_topk: int = of_layer(config.moe_topk, layer)
        count = of_layer(config.num_experts, layer)
        if config.use_mixed_mlp_moe:
            self.shared_mlp = Expert(config.hidden_size, inner * of_layer(config.num_shared_expert, layer))
        self.gate = Gate(config.hidden_size, count)
        self.experts = nn.ModuleList(Expert(config.hidden_size, inner) for _ in range(count))


class Attention(nn.Module):
    """Of queries in groups, with normalised queries and keys."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads, self.groups, self.dim = config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, (self.heads + 2 * self.groups) * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, config.hidden_size, bias=False)
        self.query_layernorm, self.key_layernorm = RMSNorm(self.dim), RMSNorm(self.dim)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Of hidden states (B, S, D)."""
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
    """A block."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp: nn.Module = Mixture(config, layer)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(config.hidden_size), RMSNorm(config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor]:
        """Of hidden states (B, S, D)."""
        x = x + self.self_attn(self.input_layernorm(x), mask, cos, sin)
        return (x + self.mlp(self.post_attention_layernorm(x)),)


class ResBlock(nn.Module):
    """Convolutions, told the time."""

    def __init__(self, channels: int, width: int, out: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * out))
        conv = nn.Conv2d(out, out, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(GROUPS, out), nn.SiLU(), nn.Dropout(0.0), conv)
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Of pictures (B, C, h, w) and embeddings of their times (B, D)."""
        scale, shift = self.emb_layers(time)[:, :, None, None].chunk(2, dim=1)
        norm, *others = self.out_layers
        h = norm(self.in_layers(x)) * (1 + scale) + shift
        for layer in others:
            h = layer(h)
        result: Tensor = self.skip_connection(x) + h
        return result


class PatchEmbed(nn.Module):
    """Image tokens of latents."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, width = config.patch_embed_hidden_dim, config.hidden_size
        self.model = nn.ModuleList(
            [nn.Conv2d(config.vae["latent_channels"], hidden, 3, padding=1), ResBlock(hidden, width, width)]
        )

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, int, int]:
        """Tokens (B, h w, D), and h and w."""
        x = self.model[1](self.model[0](x), time)
        return x.flatten(2).transpose(1, 2), *x.shape[-2:]


class FinalLayer(nn.Module):
    """Velocities of image tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, width = config.patch_embed_hidden_dim, config.hidden_size
        out = nn.Conv2d(hidden, config.vae["latent_channels"], 3, padding=1)
        self.model = nn.ModuleList(
            [ResBlock(width, width, hidden), nn.Sequential(nn.GroupNorm(GROUPS, hidden), nn.SiLU(), out)]
        )

    def forward(self, x: Tensor, time: Tensor, height: int, width: int) -> Tensor:
        """(B, C, h, w)."""
        x = x.transpose(1, 2).reshape(len(x), -1, height, width)
        result: Tensor = self.model[1](self.model[0](x, time))
        return result


class Backbone(nn.Module):
    """Embeddings of tokens, and blocks."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HunyuanImage3DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size)


class DescribedHunyuanImage3(nn.Module):
    """In the place of the published class; its sequences have one length, and their pictures one place.

    Args:
        config: The published settings.
    """

    _no_split_modules: ClassVar[list[str]] = ["HunyuanImage3DecoderLayer"]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        # Parts that do not draw, which are left out in any case.
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
        """As the published forward in its first step of drawing."""
        (place, _shape), *_rest = rope_image_info[0]
        x = self.model.wte(input_ids)
        tokens, height, width = self.patch_embed(images, self.time_embed(timesteps))
        x[:, place] = tokens
        for embedder, values, index in (
            ("timestep_emb", timesteps, timesteps_index),
            ("guidance_emb", guidance, guidance_index),
            ("timestep_r_emb", timesteps_r, timesteps_r_index),
        ):
            if index is not None:
                x[:, int(index[0, 0])] = self.get_submodule(embedder)(values).to(x.dtype)
        # The table of positions is of the sequence's length in training, and takes as much whatever is in it.
        cos = sin = torch.ones(len(x), 1, x.shape[1], self.config.attention_head_dim)
        for layer in self.model.layers:
            (x,) = layer(x, attention_mask, cos, sin)
        velocity = self.final_layer(x[:, place], self.time_embed_2(timesteps), height, width)
        return SimpleNamespace(diffusion_prediction=velocity)


def of_layer(value: Any, layer: int) -> Any:
    """A setting that is given once, or once for each layer."""
    return value[layer] if isinstance(value, list) else value
