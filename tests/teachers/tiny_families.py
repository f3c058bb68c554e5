"""Tiny pipelines of every family, with random weights and the classes that users load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from lightning_distill.teachers import DiffusersAdapter, HunyuanImage3Adapter, ModelAdapter
from lightning_distill.teachers.embedded import EOS, build_tokenizer
from tests.teachers.hunyuan_image3.tiny_pipeline import FORMS, save_stand_in
from tests.tiny import WORDS, tiny_pipeline, tiny_vae

LENGTH = 8
"""Number of tokens to which prompts are padded."""


def clip(tokenizer: PreTrainedTokenizerFast, width: int = 16) -> CLIPTextModelWithProjection:
    eos = tokenizer.convert_tokens_to_ids(EOS)
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=eos + 1,
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            eos_token_id=eos,
            bos_token_id=None,
            pad_token_id=0,
        )
    )


def t5(tokenizer: PreTrainedTokenizerFast, width: int) -> T5EncoderModel:
    eos = tokenizer.convert_tokens_to_ids(EOS)
    return T5EncoderModel(
        T5Config(
            vocab_size=eos + 1,
            d_model=width,
            d_kv=8,
            d_ff=width,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            eos_token_id=eos,
            pad_token_id=0,
        )
    )


def flux(**options: Any) -> DiffusionPipeline:
    return tiny_pipeline(scheduler={"shift": 2.0}, **options)


def flux_guided() -> DiffusionPipeline:
    return flux(guidance_embeds=True)


def stable_diffusion_3() -> DiffusionPipeline:
    tokenizers = [build_tokenizer(WORDS, LENGTH) for _ in range(3)]
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        text_encoder=clip(tokenizers[0]),
        tokenizer=tokenizers[0],
        text_encoder_2=clip(tokenizers[1]),
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5(tokenizers[2], 32),
        tokenizer_3=tokenizers[2],
    )


def qwen_vl(tokenizer: PreTrainedTokenizerFast, width: int = 16, layers: int = 2) -> Qwen2_5_VLForConditionalGeneration:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 10000.0}
    text = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers, "rope_parameters": rope, **heads}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    vocabulary = tokenizer.convert_tokens_to_ids(EOS) + 1
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config={**text, "vocab_size": vocabulary}, vision_config=vision)
    )


def qwen_image() -> DiffusionPipeline:
    tokenizer = build_tokenizer(WORDS, LENGTH)
    transformer = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True])
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9),
        vae=vae,
        text_encoder=qwen_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def flux2_parts(guidance_embeds: bool, width: int) -> dict[str, Any]:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * width,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    return {"vae": vae, "transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler(shift=2.0)}


def flux2() -> DiffusionPipeline:
    tokenizer, width = build_tokenizer(WORDS, LENGTH), 8
    tokenizer.chat_template = "{{ messages[-1].content[0].text }}"
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": width}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {"model_type": "mistral", "hidden_size": width, "num_hidden_layers": 30, **heads}
    text["vocab_size"] = tokenizer.convert_tokens_to_ids(EOS) + 1
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    return Flux2Pipeline(text_encoder=encoder, tokenizer=tokenizer, **flux2_parts(True, width))


def flux2_klein() -> DiffusionPipeline:
    tokenizer, width = build_tokenizer(WORDS, LENGTH), 8
    tokenizer.chat_template = "{{ messages[-1].content }}"
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": width}
    vocabulary = tokenizer.convert_tokens_to_ids(EOS) + 1
    encoder = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=28, **heads))
    return Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer, **flux2_parts(False, width))


def z_image() -> DiffusionPipeline:
    tokenizer, width = build_tokenizer(WORDS, LENGTH), 8
    tokenizer.chat_template = "{{ messages[-1].content }}"
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": width}
    vocabulary = tokenizer.convert_tokens_to_ids(EOS) + 1
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=width,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        text_encoder=Qwen3Model(Qwen3Config(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=2, **heads)),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def sana() -> DiffusionPipeline:
    tokenizer, width = build_tokenizer(WORDS, LENGTH), 8
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": width}
    vocabulary = tokenizer.convert_tokens_to_ids(EOS) + 1
    gemma = Gemma2Config(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=1, query_pre_attn_scalar=4, **heads)
    transformer = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=width,
        sample_size=8,
    )
    vae = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_qkv_multiscales=((), (5,), (5,)),
        decoder_qkv_multiscales=((), (5,), (5,)),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(gemma),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def hunyuan_image(distilled: bool = False) -> DiffusionPipeline:
    tokenizer, glyphs = build_tokenizer(WORDS, 32), build_tokenizer(WORDS, LENGTH)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        rope_axes_dim=(4, 4),
        guidance_embeds=distilled,
        use_meanflow=distilled,
    )
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=32,
        scaling_factor=0.7,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    return HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=vae,
        text_encoder=qwen_vl(tokenizer, layers=3),
        tokenizer=tokenizer,
        text_encoder_2=t5(glyphs, 16),
        tokenizer_2=glyphs,
        transformer=transformer,
    )


def hunyuan_image_distilled() -> DiffusionPipeline:
    return hunyuan_image(distilled=True)


FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "flux": flux,
    "flux_guided": flux_guided,
    "flux2": flux2,
    "flux2_klein": flux2_klein,
    "hunyuan_image": hunyuan_image,
    "hunyuan_image_distilled": hunyuan_image_distilled,
    "qwen_image": qwen_image,
    "sana": sana,
    "stable_diffusion_3": stable_diffusion_3,
    "z_image": z_image,
}


def save_family(name: str, directory: Path) -> str:
    """Write a tiny pipeline, or a stand-in model for HunyuanImage 3.0, and return its directory."""
    if name in FORMS:
        return save_stand_in(name, directory)
    torch.manual_seed(0)
    FAMILIES[name]().save_pretrained(directory)
    return str(directory)


def make_adapter(directory: str, **options: Any) -> ModelAdapter:
    """An adapter for a directory from `save_family` or from an export."""
    if (Path(directory) / "model_index.json").is_file():
        return DiffusersAdapter(directory, **options)
    options = {"torch_dtype": "float32", "max_sequence_length": 2 * LENGTH, **options}
    return HunyuanImage3Adapter(directory, trust_remote_code=True, **options)


def load_family(directory: str, **options: Any) -> ModelAdapter:
    """A loaded adapter for a directory from `save_family` or from an export."""
    adapter = make_adapter(directory, **options)
    adapter.check()
    adapter.load()
    return adapter
