"""Original layouts of FLUX.1 and FLUX.2 (black-forest-labs/flux, black-forest-labs/flux2)."""

from lightning_distill.export.original.layout import Layout, Place, Stack, fused, renamed


def _norms(original: str, query: str, key: str) -> dict[str, Place]:
    """Norms of queries and keys, whose weight is called `scale`."""
    names = {query: f"{original}.query_norm", key: f"{original}.key_norm"}
    return {name: Place(each, weight="scale") for name, each in names.items()}


_ATTENTION = {
    **fused("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    **fused("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    **_norms("img_attn.norm", "attn.norm_q", "attn.norm_k"),
    **_norms("txt_attn.norm", "attn.norm_added_q", "attn.norm_added_k"),
    **renamed({"attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj"}),
}
_ENDS = {
    **renamed({"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True),
}


def _embedders(stem: str, names: dict[str, str]) -> dict[str, Place]:
    """Embedders of times, guidance and pooled prompts: two layers each."""
    layers = {"linear_1": "in_layer", "linear_2": "out_layer"}
    return renamed(
        {f"{stem}.{name}.{layer}": f"{original}.{each}" for name, original in names.items() for layer, each in layers.items()}
    )


FLUX = Layout(
    stacks={
        "transformer_blocks": Stack(
            "double_blocks",
            {
                **_ATTENTION,
                **renamed(
                    {
                        "norm1.linear": "img_mod.lin",
                        "norm1_context.linear": "txt_mod.lin",
                        "ff.net.0.proj": "img_mlp.0",
                        "ff.net.2": "img_mlp.2",
                        "ff_context.net.0.proj": "txt_mlp.0",
                        "ff_context.net.2": "txt_mlp.2",
                    }
                ),
            },
        ),
        "single_transformer_blocks": Stack(
            "single_blocks",
            {
                **fused("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", sizes=(1, 1, 1, 4)),
                **_norms("norm", "attn.norm_q", "attn.norm_k"),
                **renamed({"proj_out": "linear2", "norm.linear": "modulation.lin"}),
            },
        ),
    },
    places={
        **_ENDS,
        **_embedders(
            "time_text_embed",
            {"timestep_embedder": "time_in", "guidance_embedder": "guidance_in", "text_embedder": "vector_in"},
        ),
    },
)
"""FLUX.1, dev and schnell; its networks are 3072 wide."""

FLUX_2 = Layout(
    stacks={
        "transformer_blocks": Stack(
            "double_blocks",
            {
                **_ATTENTION,
                **renamed(
                    {
                        "ff.linear_in": "img_mlp.0",
                        "ff.linear_out": "img_mlp.2",
                        "ff_context.linear_in": "txt_mlp.0",
                        "ff_context.linear_out": "txt_mlp.2",
                    }
                ),
            },
        ),
        "single_transformer_blocks": Stack(
            "single_blocks",
            {
                **renamed({"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}),
                **_norms("norm", "attn.norm_q", "attn.norm_k"),
            },
        ),
    },
    places={
        **_ENDS,
        **_embedders("time_guidance_embed", {"timestep_embedder": "time_in", "guidance_embedder": "guidance_in"}),
        **renamed(
            {
                f"{name}.linear": f"{name}.lin"
                for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
            }
        ),
    },
)
"""FLUX.2, dev and klein."""
