"""The older published version: one time with a different name, positions from the caller, a tokenizer wrapper."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationMixin, PreTrainedModel
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


class TokenizerWrapper(ChatTemplate):
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.pad_token_id = self.tokenizer.pad_token_id
        self.special_token_map = self.tokenizer.added_tokens_encoder
        for name in ("boi", "eoi", "img", "cfg"):
            setattr(self, f"{name}_token_id", self.ids(f"<{name}>"))

    def ids(self, token: str) -> int:
        return self.special_token_map[token]

    def text_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


class HunyuanImage3ImageProcessor:
    def __init__(self, config: HunyuanImage3Config) -> None:
        self.config = config

    def build_image_info(self, image_size: tuple[int, int]) -> ImageInfo:
        return closest(self.config, image_size)


class HunyuanImage3ForCausalMM(PreTrainedModel, GenerationMixin):
    config_class = HunyuanImage3Config
    _no_split_modules = ["HunyuanImage3DecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: HunyuanImage3Config) -> None:
        super().__init__(config)
        self._tkwrapper = None
        self.image_processor = HunyuanImage3ImageProcessor(config)
        self.vae = AutoencoderKLConv3D.from_config(config.vae)
        self.vision_model = nn.Linear(4, 4)
        self.vision_aligner = nn.Linear(4, config.hidden_size)
        self.timestep_emb = TimestepEmbedder(config.hidden_size)
        self.patch_embed = UNetDown(config)
        self.time_embed = TimestepEmbedder(config.hidden_size)
        self.final_layer = UNetUp(config)
        self.time_embed_2 = TimestepEmbedder(config.hidden_size)
        self.model = HunyuanImage3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def tokenizer(self) -> TokenizerWrapper:
        if self._tkwrapper is None:
            raise ValueError("Attribute `tokenizer` has not been initialized yet. Please set it first.")
        return self._tkwrapper

    def load_tokenizer(self, tokenizer: str) -> None:
        self._tkwrapper = TokenizerWrapper(tokenizer)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        custom_pos_emb: tuple[Tensor, Tensor] | None = None,
        mode: str = "gen_text",
        first_step: bool | None = None,
        images: Tensor | None = None,
        image_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        gen_timestep_scatter_index: Tensor | None = None,
    ) -> CausalMMOutputWithPast:
        assert mode == "gen_image"
        assert first_step
        cos, sin = (torch.stack([row[i] for row, i in zip(x, position_ids, strict=True)]) for x in custom_pos_emb)
        hidden_states = self.model.wte(input_ids)
        image, token_h, token_w = self.patch_embed(images, self.time_embed(timestep))
        hidden_states = scatter_image(hidden_states, image, image_mask)
        hidden_states = scatter_token(hidden_states, self.timestep_emb(timestep.reshape(-1)), gen_timestep_scatter_index)
        hidden_states = self.model(
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_values,
            use_cache=use_cache,
            custom_pos_emb=(cos, sin),
            mode=mode,
            first_step=first_step,
            gen_timestep_scatter_index=gen_timestep_scatter_index,
        )
        output = select_image(hidden_states, image_mask)
        return CausalMMOutputWithPast(
            diffusion_prediction=self.final_layer(output, self.time_embed_2(timestep), token_h, token_w)
        )

    def prepare_model_inputs(self, prompt: list[str], image_size: tuple[int, int], system_prompt: str | None) -> dict[str, Any]:
        """Inputs of `forward` except images and times; the second half of the batch has null conditions."""
        info = self.image_processor.build_image_info(image_size)
        output = self.tokenizer.apply_chat_template(
            batch_prompt=prompt,
            mode="gen_image",
            batch_gen_image_info=[info] * len(prompt),
            batch_system_prompt=[system_prompt] * len(prompt),
            sequence_template=self.generation_config.sequence_template,
            cfg_factor=2,
        )["output"]
        rows, length = output.tokens.shape
        shape = (info.token_height, info.token_width)
        rope = [[(where, shape)] for (where,) in output.gen_image_slices]
        return {
            "input_ids": output.tokens,
            "attention_mask": attention_mask(output),
            "position_ids": torch.arange(length).expand(rows, -1),
            "mode": "gen_image",
            "image_mask": output.gen_image_mask,
            "custom_pos_emb": build_batch_2d_rope(
                length, self.config.attention_head_dim, rope, output.tokens.device, self.config.rope_theta
            ),
            "gen_timestep_scatter_index": output.gen_timestep_scatter_index,
        }
