"""Tiny pipelines of every family, of the very classes that users load, with random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from lightning_distill.models.embedded import EOS, build_tokenizer
from tests.tiny import WORDS, tiny_pipeline, tiny_vae

LENGTH = 8
"""Tokens that prompts are padded to."""


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


FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "flux": flux,
    "flux_guided": flux_guided,
    "stable_diffusion_3": stable_diffusion_3,
}


def save_family(name: str, directory: Path) -> str:
    """Write a tiny pipeline and return where."""
    torch.manual_seed(0)
    FAMILIES[name]().save_pretrained(directory)
    return str(directory)
