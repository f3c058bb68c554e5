"""The newer published version: named times and guidance, positions from the model, a tokenizer class."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import ModelOutput

from .autoencoder_kl_3d import AutoencoderKLConv3D
from .backbone import (
    HunyuanImage3Model,
    TimestepEmbedder,
    UNetDown,
    UNetUp,
    build_batch_2d_rope,
    scatter_image,
    scatter_token,
    select_image,
)
from .configuration_hunyuan_image_3 import HunyuanImage3Config
from .token_layout import ChatTemplate, ImageInfo, attention_mask, closest


@dataclass
class CausalMMOutputWithPast(ModelOutput):
    logits: Tensor | None = None
    diffusion_prediction: Tensor | None = None


class HunyuanImage3TokenizerFast(ChatTemplate, PreTrainedTokenizerFast):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("boi", "eoi", "img", "cfg", "timestep", "timestep_r", "guidance"):
            setattr(self, f"{name}_token_id", self.ids(f"<{name}>"))

    def ids(self, token: str) -> int:
        return self.convert_tokens_to_ids(token)

    def text_ids(self, text: str) -> list[int]:
        return self.encode(text, add_special_tokens=False)


class HunyuanImage3ImageProcessor:
    def __init__(self, config: HunyuanImage3Config) -> None:
        self.config = config

    def build_gen_image_info(
        self, image_size: tuple[int, int], add_guidance_token: bool = False, add_timestep_r_token: bool = False
    ) -> ImageInfo:
        flags = {"add_guidance_token": add_guidance_token, "add_timestep_r_token": add_timestep_r_token}
        return closest(self.config, image_size, **flags)


class HunyuanImage3ForCausalMM(PreTrainedModel, GenerationMixin):
    config_class = HunyuanImage3Config
    _no_split_modules = ["HunyuanImage3DecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: HunyuanImage3Config) -> None:
        super().__init__(config)
        self._tokenizer = None
        self.image_processor = HunyuanImage3ImageProcessor(config)
        self.vae = AutoencoderKLConv3D.from_config(config.vae)
        self.vision_model = nn.Linear(4, 4)
        self.vision_aligner = nn.Linear(4, config.hidden_size)
        self.timestep_emb = TimestepEmbedder(config.hidden_size)
        if config.cfg_distilled:
            self.guidance_emb = TimestepEmbedder(config.hidden_size)
        if config.use_meanflow:
            self.timestep_r_emb = TimestepEmbedder(config.hidden_size)
        self.patch_embed = UNetDown(config)
        self.time_embed = TimestepEmbedder(config.hidden_size)
        self.final_layer = UNetUp(config)
        self.time_embed_2 = TimestepEmbedder(config.hidden_size)
        self.model = HunyuanImage3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.num_special_tokens = None
        self.post_init()

    @property
    def tokenizer(self) -> HunyuanImage3TokenizerFast:
        if self._tokenizer is None:
            raise ValueError("Attribute `tokenizer` has not been initialized yet. Please set it first.")
        return self._tokenizer

    def load_tokenizer(self, tokenizer: str) -> None:
        self._tokenizer = HunyuanImage3TokenizerFast.from_pretrained(tokenizer)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rope_image_info: list[list[tuple[slice, tuple[int, int]]]] | None = None,
        return_dict: bool = True,
        images: Tensor | None = None,
        image_mask: Tensor | None = None,
        timesteps: Tensor | None = None,
        timesteps_index: Tensor | None = None,
        timesteps_r: Tensor | None = None,
        timesteps_r_index: Tensor | None = None,
        guidance: Tensor | None = None,
        guidance_index: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        mode: str | None = None,
        first_step: bool | None = None,
        use_cache: bool | None = None,
    ) -> CausalMMOutputWithPast:
        assert mode == "gen_image"
        assert first_step
        # as in the published code: in evaluation mode, the table of positions has the largest sequence length
        length = input_ids.size(1) if self.training else self.config.max_position_embeddings
        cos, sin = build_batch_2d_rope(
            length, self.config.attention_head_dim, rope_image_info, input_ids.device, self.config.rope_theta
        )
        if position_ids is not None:
            index = position_ids[..., None].expand(-1, -1, cos.size(-1))
            cos, sin = cos.gather(1, index), sin.gather(1, index)
        hidden_states = self.model.wte(input_ids)
        image, token_h, token_w = self.patch_embed(images, self.time_embed(timesteps))
        hidden_states = scatter_image(hidden_states, image, image_mask)
        hidden_states = scatter_token(hidden_states, self.timestep_emb(timesteps.reshape(-1)), timesteps_index)
        if guidance_index is not None:
            hidden_states = scatter_token(hidden_states, self.guidance_emb(guidance.reshape(-1)), guidance_index)
        if timesteps_r_index is not None:
            hidden_states = scatter_token(hidden_states, self.timestep_r_emb(timesteps_r.reshape(-1)), timesteps_r_index)
        hidden_states = self.model(
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_values,
            use_cache=use_cache,
            custom_pos_emb=(cos, sin),
            mode=mode,
            first_step=first_step,
            post_token_len=self.post_token_len,  # as in the published code: only `generate` sets it
        )
        output = select_image(hidden_states, image_mask)
        return CausalMMOutputWithPast(
            diffusion_prediction=self.final_layer(output, self.time_embed_2(timesteps), token_h, token_w)
        )

    def prepare_model_inputs(self, prompt: list[str], image_size: tuple[int, int], system_prompt: str | None) -> dict[str, Any]:
        """Inputs of `forward` except images, times and guidance; without `cfg_distilled`, half are null conditions."""
        info = self.image_processor.build_gen_image_info(
            image_size, add_guidance_token=self.config.cfg_distilled, add_timestep_r_token=self.config.use_meanflow
        )
        output = self.tokenizer.apply_chat_template(
            batch_prompt=prompt,
            mode="gen_image",
            batch_gen_image_info=[info] * len(prompt),
            batch_system_prompt=[system_prompt] * len(prompt),
            sequence_template=self.generation_config.sequence_template,
            cfg_factor=1 if self.config.cfg_distilled else 2,
        )["output"]
        rows, length = output.tokens.shape
        shape = (info.token_height, info.token_width)
        return {
            "input_ids": output.tokens,
            "attention_mask": attention_mask(output),
            "position_ids": torch.arange(length).expand(rows, -1),
            "mode": "gen_image",
            "image_mask": output.gen_image_mask,
            "rope_image_info": [[(where, shape)] for (where,) in output.gen_image_slices],
            "timesteps_index": output.gen_timestep_scatter_index,
            "guidance_index": output.guidance_scatter_index,
            "timesteps_r_index": output.gen_timestep_r_scatter_index,
        }
