"""Original layout of Sana (NVlabs/Sana)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_distill.export.original.layout import Layout, Stack, fused, renamed


def _placeholders(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Positions and the null caption of the training; diffusers expects them in a file and drops them."""
    caption, image = weights["caption_projection.linear_1.weight"], weights["proj_out.weight"]
    return {
        "pos_embed": torch.zeros(1, 1, image.shape[1], dtype=image.dtype),
        "y_embedder.y_embedding": torch.zeros(300, caption.shape[1], dtype=caption.dtype),
    }


SANA = Layout(
    stacks={
        "transformer_blocks": Stack(
            "blocks",
            {
                **fused("attn.qkv", "attn1.to_q", "attn1.to_k", "attn1.to_v"),
                **fused("cross_attn.kv_linear", "attn2.to_k", "attn2.to_v"),
                **renamed(
                    {
                        "scale_shift_table": "scale_shift_table",
                        "attn1.to_out.0": "attn.proj",
                        "attn2.to_q": "cross_attn.q_linear",
                        "attn2.to_out.0": "cross_attn.proj",
                        "ff.conv_inverted": "mlp.inverted_conv.conv",
                        "ff.conv_depth": "mlp.depth_conv.conv",
                        "ff.conv_point": "mlp.point_conv.conv",
                    }
                ),
            },
        )
    },
    places=renamed(
        {
            "patch_embed.proj": "x_embedder.proj",
            "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "time_embed.linear": "t_block.1",
            "caption_projection.linear_1": "y_embedder.y_proj.fc1",
            "caption_projection.linear_2": "y_embedder.y_proj.fc2",
            "caption_norm": "attention_y_norm",
            "proj_out": "final_layer.linear",
            "scale_shift_table": "final_layer.scale_shift_table",
        }
    ),
    placeholders=_placeholders,
)
