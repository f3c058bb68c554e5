"""The transformer and its convolutions, shared by both published versions of the code."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 8
"""Number of group-norm groups. The published 32 would equal the number of channels here, so a bias would have no effect."""


def timestep_embedding(t: Tensor, dim: int, max_period: int = 10000) -> Tensor:
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256) -> None:
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t, self.frequency_embedding_size).type(self.mlp[0].weight.dtype))


def build_batch_2d_rope(
    seq_len: int, n_elem: int, image_infos: list[Any], device: torch.device, base: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Text positions are on the diagonal; image positions are centred on the text span that the image replaces."""
    theta = 1.0 / base ** (torch.arange(0, n_elem, 2, device=device).float() / n_elem)
    rows = []
    for infos in image_infos:
        y = torch.arange(seq_len, device=device).float()
        x = y.clone()
        for where, (h, w) in infos:
            down, across = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
            y[where] = (where.start + (w * h - h) / 2 + down.flatten()).long().float()
            x[where] = (where.start + (w * h - w) / 2 + across.flatten()).long().float()
        positions = torch.stack([y, x], dim=1)[:, None]
        angles = (positions * theta.reshape(1, n_elem // 4, 2)).reshape(seq_len, n_elem // 2).repeat(1, 2)
        rows.append(angles)
    angles = torch.stack(rows)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class HunyuanMLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_and_up_proj = nn.Linear(config.hidden_size, 2 * config.moe_intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.moe_intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_and_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * F.silu(gate))


class HunyuanTopKGate(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.moe_topk = config.moe_topk
        self.wg = nn.Linear(config.hidden_size, config.num_experts, bias=False, dtype=torch.float32)

    def forward(self, hidden_states: Tensor, topk_impl: str = "easy") -> tuple[Tensor, Tensor]:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        flat = flat.float() if self.wg.weight.dtype == torch.float32 else flat
        weights, index = self.wg(flat).softmax(dim=1).topk(self.moe_topk)
        return weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-8), index


class HunyuanMoE(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.moe_topk, self.num_experts = config.moe_topk, config.num_experts
        if config.use_mixed_mlp_moe:
            self.shared_mlp = HunyuanMLP(config)
        self.gate = HunyuanTopKGate(config)
        self.experts = nn.ModuleList(HunyuanMLP(config) for _ in range(config.num_experts))

    def forward(self, hidden_states: Tensor) -> Tensor:
        torch.cuda.set_device(hidden_states.device.index)  # as in the published code: raises without a GPU
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, index = self.gate(hidden_states)
        repeated = flat.repeat_interleave(self.moe_topk, dim=0)
        outputs = torch.zeros_like(repeated)
        for i, expert in enumerate(self.experts):
            outputs[index.view(-1) == i] = expert(repeated[index.view(-1) == i])
        mixed = (outputs.view(*index.shape, -1) * weights.to(flat.dtype).unsqueeze(-1)).sum(dim=1).view_as(hidden_states)
        return self.shared_mlp(hidden_states) + mixed if hasattr(self, "shared_mlp") else mixed


class HunyuanImage3SDPAAttention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads, self.groups, self.dim = config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, (self.heads + 2 * self.groups) * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, config.hidden_size, bias=False)
        self.query_layernorm, self.key_layernorm = RMSNorm(self.dim), RMSNorm(self.dim)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, custom_pos_emb: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, _ = hidden_states.shape
        share = self.heads // self.groups
        qkv = self.qkv_proj(hidden_states).reshape(batch, length, self.groups, share + 2, self.dim)
        query, key, value = qkv.split([share, 1, 1], dim=3)
        query, key, value = (x.reshape(batch, length, -1, self.dim).transpose(1, 2) for x in (query, key, value))
        query = self.query_layernorm(rotate(query, *custom_pos_emb)).to(value.dtype)
        key = self.key_layernorm(rotate(key, *custom_pos_emb)).to(value.dtype)
        key, value = (x.repeat_interleave(share, dim=1) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class HunyuanImage3DecoderLayer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self_attn = HunyuanImage3SDPAAttention(config)
        self.mlp = HunyuanMoE(config)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(config.hidden_size), RMSNorm(config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: Any = None,
        use_cache: bool | None = False,
        custom_pos_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), attention_mask, custom_pos_emb)
        return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)


class HunyuanImage3Model(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HunyuanImage3DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size)

    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)[0]
        return hidden_states


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, emb_channels: int, out_channels: int) -> None:
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, in_channels), nn.SiLU(), conv)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels))
        conv = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(GROUPS, out_channels), nn.SiLU(), nn.Dropout(0.0), conv)
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[0](self.in_layers(x)) * (1 + scale) + shift
        return self.skip_connection(x) + self.out_layers[1:](h)


class UNetDown(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, width = config.patch_embed_hidden_dim, config.hidden_size
        conv = nn.Conv2d(config.vae["latent_channels"], hidden, 3, padding=1)
        self.model = nn.ModuleList([conv, ResBlock(hidden, width, width)])

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, int, int]:
        x = self.model[1](self.model[0](x), t)
        return x.flatten(2).transpose(1, 2), *x.shape[-2:]


class UNetUp(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, width = config.patch_embed_hidden_dim, config.hidden_size
        conv = nn.Conv2d(hidden, config.vae["latent_channels"], 3, padding=1)
        out = nn.Sequential(nn.GroupNorm(GROUPS, hidden), nn.SiLU(), conv)
        self.model = nn.ModuleList([ResBlock(width, width, hidden), out])

    def forward(self, x: Tensor, t: Tensor, token_h: int, token_w: int) -> Tensor:
        x = x.transpose(1, 2).reshape(len(x), -1, token_h, token_w)
        return self.model[1](self.model[0](x, t))


def scatter_image(hidden_states: Tensor, image: Tensor, image_mask: Tensor) -> Tensor:
    batch, length, width = hidden_states.shape
    index = torch.arange(length, device=image.device).repeat(batch, 1).masked_select(image_mask).reshape(batch, -1)
    return hidden_states.scatter_(dim=1, index=index[..., None].repeat(1, 1, width), src=image)


def scatter_token(hidden_states: Tensor, token: Tensor, index: Tensor) -> Tensor:
    width = hidden_states.shape[-1]
    return hidden_states.scatter_(dim=1, index=index[..., None].repeat(1, 1, width), src=token.reshape(len(token), -1, width))


def select_image(hidden_states: Tensor, image_mask: Tensor) -> Tensor:
    batch, _, width = hidden_states.shape
    return hidden_states.masked_select(image_mask[..., None]).reshape(batch, -1, width)
