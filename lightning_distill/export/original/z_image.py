"""Original layout of Z-Image (Tongyi-MAI/Z-Image)."""

from lightning_distill.export.original.layout import Layout, Stack, fused, renamed

_BLOCK = {
    **fused("attention.qkv", "attention.to_q", "attention.to_k", "attention.to_v"),
    **renamed(
        {
            "attention.to_out.0": "attention.out",
            "attention.norm_q": "attention.q_norm",
            "attention.norm_k": "attention.k_norm",
        }
    ),
}

Z_IMAGE = Layout(
    stacks={name: Stack(name, _BLOCK) for name in ("layers", "noise_refiner", "context_refiner")},
    places=renamed(
        {
            "all_x_embedder.2-1": "x_embedder",
            "all_final_layer.2-1.linear": "final_layer.linear",
            "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
        }
    ),
    keeps_others=True,
)
