"""Original layout of Stable Diffusion 3 and 3.5 (Stability-AI/sd3.5)."""

from lightning_distill.export.original.layout import Layout, Place, Stack, fused, renamed

_EMBEDDERS = {"timestep_embedder": "t_embedder", "text_embedder": "y_embedder"}

STABLE_DIFFUSION_3 = Layout(
    stacks={
        "transformer_blocks": Stack(
            "joint_blocks",
            {
                **fused("x_block.attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
                **fused("x_block.attn2.qkv", "attn2.to_q", "attn2.to_k", "attn2.to_v"),
                **fused("context_block.attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                **renamed(
                    {
                        "attn.norm_q": "x_block.attn.ln_q",
                        "attn.norm_k": "x_block.attn.ln_k",
                        "attn.norm_added_q": "context_block.attn.ln_q",
                        "attn.norm_added_k": "context_block.attn.ln_k",
                        "attn.to_out.0": "x_block.attn.proj",
                        "attn.to_add_out": "context_block.attn.proj",
                        "attn2.norm_q": "x_block.attn2.ln_q",
                        "attn2.norm_k": "x_block.attn2.ln_k",
                        "attn2.to_out.0": "x_block.attn2.proj",
                        "norm1.linear": "x_block.adaLN_modulation.1",
                        "norm1_context.linear": "context_block.adaLN_modulation.1",
                        "ff.net.0.proj": "x_block.mlp.fc1",
                        "ff.net.2": "x_block.mlp.fc2",
                        "ff_context.net.0.proj": "context_block.mlp.fc1",
                        "ff_context.net.2": "context_block.mlp.fc2",
                    }
                ),
            },
            # It modulates prompt tokens by scale and shift only, as the output layer does.
            last={"norm1_context.linear": Place("context_block.adaLN_modulation.1", swapped=True)},
        )
    },
    places={
        "pos_embed.pos_embed": Place("pos_embed"),
        "pos_embed.proj": Place("x_embedder.proj"),
        "context_embedder": Place("context_embedder"),
        "proj_out": Place("final_layer.linear"),
        "norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True),
        **renamed(
            {
                f"time_text_embed.{name}.linear_{number}": f"{original}.mlp.{2 * number - 2}"
                for name, original in _EMBEDDERS.items()
                for number in (1, 2)
            }
        ),
    },
)
