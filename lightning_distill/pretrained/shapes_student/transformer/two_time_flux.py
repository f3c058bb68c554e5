"""A FLUX transformer that is told where a step ends as well as where it starts.

This file imports torch and diffusers only: it travels with every exported student and must run without this package.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

TIME_SCALE = 1000.0
"""FLUX multiplies times and guidance scales by this before its sinusoids."""
TIME_CHANNELS = 256


class SmoothTimeProjection(nn.Module):
    """Sinusoidal features of bounded frequency, in place of diffusers' `Timesteps`.

    FLUX's own features oscillate with up to 1000 rad per unit of t, and the derivative of a network along t inherits that.
    Here the angular frequencies are spaced evenly from a quarter of pi up to `frequency_bound`.

    Args:
        frequency_bound: Largest angular frequency, in rad per unit of t; above pi / 4.
        channels: Number of features, half of them cosines.
    """

    def __init__(self, frequency_bound: float, channels: int = TIME_CHANNELS) -> None:
        super().__init__()
        self.frequency_bound = frequency_bound
        self.channels = channels

    def forward(self, timesteps: Tensor) -> Tensor:
        """Features (B, channels), at least float32, of `timesteps` (B,) in [0, 1000]."""
        times = at_least_float32(timesteps) / TIME_SCALE
        # Not a buffer: `module.to(bfloat16)` would round the frequencies.
        frequencies = torch.linspace(
            torch.pi / 4, self.frequency_bound, self.channels // 2, device=times.device, dtype=times.dtype
        )
        angles = times[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


class Float32TimestepEmbedding(TimestepEmbedding):
    """A `TimestepEmbedding` whose weights stay float32 when the model around it is cast to less.

    In bfloat16 a time near 1 has a resolution of 0.004, too coarse for a derivative along it.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32TimestepEmbedding":
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

        return super()._apply(move_only, recurse)

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Embeddings (B, D) of features (B, F), in the precision of the weights."""
        embedding: Tensor = super().forward(sample.to(self.linear_1.weight.dtype), condition)
        return embedding


class TwoTimeFluxTransformer2DModel(FluxTransformer2DModel):
    r"""FLUX transformer with float32 time embeddings and, for a student, a second time input.

    The conditioning vector of a step from t down to r is

    .. math:: e = E_t(\phi(t)) + E_\Delta(\phi_s(t - r)) + \text{guidance} + \text{pooled prompt},

    with FLUX's sinusoids or `SmoothTimeProjection` for :math:`\phi`, and always smooth features for the interval. With
    neither extra it computes what `FluxTransformer2DModel` computes, so it loads, and serves as, a teacher.

    Args:
        interval_embedding: "none": a network of t alone. "zero": :math:`E_\Delta` ends in a layer of zeros, so that the
            network starts out independent of r. "clone": :math:`E_\Delta` starts as a copy of :math:`E_t`, fed t - r
            through the same features (arXiv 2512.13006, section 4.2).
        time_frequency_bound: Bound in rad per unit of t of smooth time features, or None for FLUX's own.
        interval_frequency_bound: The same for the features of the interval t - r, under "zero".
    """

    _keep_in_fp32_modules: ClassVar[list[str]] = ["timestep_embedder", "guidance_embedder", "interval_embedder"]

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        interval_embedding: str = "none",
        time_frequency_bound: float | None = None,
        interval_frequency_bound: float = 2 * torch.pi,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
        )
        if interval_embedding not in ("none", "zero", "clone"):
            raise ValueError(f"interval_embedding is {interval_embedding!r}; choose 'none', 'zero' or 'clone'")
        flux_features = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.guidance_proj = flux_features
        embed = self.time_text_embed
        embed.timestep_embedder = Float32TimestepEmbedding(TIME_CHANNELS, self.inner_dim)
        if guidance_embeds:
            embed.guidance_embedder = Float32TimestepEmbedding(TIME_CHANNELS, self.inner_dim)
        if time_frequency_bound is not None:
            embed.time_proj = SmoothTimeProjection(time_frequency_bound)
        self.interval_embedder: Float32TimestepEmbedding | None = None
        self.interval_proj: nn.Module | None = None
        if interval_embedding != "none":
            self.interval_embedder = Float32TimestepEmbedding(TIME_CHANNELS, self.inner_dim)
            cloned = interval_embedding == "clone"
            self.interval_proj = embed.time_proj if cloned else SmoothTimeProjection(interval_frequency_bound)

    def reset_interval_embedding(self) -> None:
        """Bring the interval embedder to its start: zeros behind the last layer, or a copy of the timestep embedder."""
        if self.interval_embedder is None:
            raise ValueError("interval_embedding is 'none': this network has no interval embedder to reset")
        if self.config.interval_embedding == "clone":
            self.interval_embedder.load_state_dict(self.time_text_embed.timestep_embedder.state_dict())
        else:
            nn.init.zeros_(self.interval_embedder.linear_2.weight)
            nn.init.zeros_(self.interval_embedder.linear_2.bias)

    def embed_conditions(
        self, timestep: Tensor, timestep_r: Tensor | None, guidance: Tensor | None, pooled_projections: Tensor
    ) -> Tensor:
        """The conditioning vector (B, D) that modulates every block; times and guidance are embedded in float32."""
        embed = self.time_text_embed
        # Autocast would round times and features to bfloat16.
        with torch.autocast(timestep.device.type, enabled=False):
            t = at_least_float32(timestep)
            vector = embed.timestep_embedder(embed.time_proj(t * TIME_SCALE))
            if self.interval_embedder is not None and self.interval_proj is not None:
                r = t if timestep_r is None else at_least_float32(timestep_r)
                vector = vector + self.interval_embedder(self.interval_proj((t - r) * TIME_SCALE))
            if guidance is not None:
                vector = vector + embed.guidance_embedder(self.guidance_proj(guidance.float() * TIME_SCALE))
        return vector.to(pooled_projections.dtype) + embed.text_embedder(pooled_projections)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        timestep_r: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Average velocity from t down to r, or the velocity at t where r is not given.

        Args:
            hidden_states: Image tokens (B, N, in_channels).
            encoder_hidden_states: Prompt embeddings (B, L, joint_attention_dim).
            pooled_projections: Pooled prompt embeddings (B, pooled_projection_dim).
            timestep: t (B,) in [0, 1], float32 whatever the dtype of the tokens; 1 is noise.
            img_ids: Positions of the image tokens (N, 3).
            txt_ids: Positions of the text tokens (L, 3).
            guidance: Guidance scale (B,), for checkpoints that embed it.
            timestep_r: r (B,) in [0, t], or None for r = t.
            joint_attention_kwargs: Passed on to the attention processors.
            return_dict: Whether to wrap the result.

        Returns:
            Velocity tokens (B, N, out_channels) as `sample`, or in a tuple.
        """
        temb = self.embed_conditions(timestep, timestep_r, guidance, pooled_projections)
        hidden_states = self.x_embedder(hidden_states)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        rope = self.pos_embed(torch.cat((txt_ids, img_ids), dim=0))
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            arguments = (hidden_states, encoder_hidden_states, temb, rope, joint_attention_kwargs)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                encoder_hidden_states, hidden_states = self._gradient_checkpointing_func(block, *arguments)
            else:
                encoder_hidden_states, hidden_states = block(*arguments)
        sample = self.proj_out(self.norm_out(hidden_states, temb))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
