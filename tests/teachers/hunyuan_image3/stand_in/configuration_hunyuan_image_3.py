"""Configuration with the published setting names."""

from typing import Any

from transformers import PretrainedConfig


class HunyuanImage3Config(PretrainedConfig):
    model_type = "hunyuan_image_3_moe"

    def __init__(
        self,
        vocab_size: int = 64,
        hidden_size: int = 32,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        num_key_value_heads: int = 1,
        attention_head_dim: int = 16,
        moe_intermediate_size: int = 16,
        num_experts: int = 4,
        moe_topk: int = 2,
        use_mixed_mlp_moe: bool = True,
        rope_theta: float = 10000.0,
        max_position_embeddings: int = 512,
        image_base_size: int = 32,
        patch_size: int = 1,
        patch_embed_hidden_dim: int = 32,
        vae_downsample_factor: tuple[int, int] = (4, 4),
        vae: dict[str, Any] | None = None,
        moe_impl: str = "eager",
        cfg_distilled: bool = False,
        use_meanflow: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.attention_head_dim = attention_head_dim
        self.moe_intermediate_size = moe_intermediate_size
        self.num_experts = num_experts
        self.moe_topk = moe_topk
        self.use_mixed_mlp_moe = use_mixed_mlp_moe
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.image_base_size = image_base_size
        self.patch_size = patch_size
        self.patch_embed_hidden_dim = patch_embed_hidden_dim
        self.vae_downsample_factor = vae_downsample_factor
        self.vae = vae or {"latent_channels": 4, "ffactor_spatial": 4, "ffactor_temporal": 4, "scaling_factor": 0.5627}
        self.moe_impl = moe_impl
        self.cfg_distilled = cfg_distilled
        self.use_meanflow = use_meanflow
        super().__init__(**kwargs)
