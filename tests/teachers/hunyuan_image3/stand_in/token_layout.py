"""Token sequences of text and one image, in the layout of the published tokenizers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIZES = ((16, 64), (32, 32), (64, 16))


@dataclass
class ImageInfo:
    image_height: int
    image_width: int
    token_height: int
    token_width: int
    base_size: int
    ratio_index: int
    add_guidance_token: bool = False
    add_timestep_r_token: bool = False


@dataclass
class TokenizerEncodeOutput:
    tokens: Tensor
    gen_image_slices: list[list[slice]]
    gen_image_mask: Tensor
    gen_timestep_scatter_index: Tensor
    guidance_scatter_index: Tensor | None = None
    gen_timestep_r_scatter_index: Tensor | None = None


def closest(config: Any, image_size: tuple[int, int], **flags: bool) -> ImageInfo:
    ratio = image_size[0] / image_size[1]
    index = min(range(len(SIZES)), key=lambda i: abs(SIZES[i][0] / SIZES[i][1] - ratio))
    height, width = SIZES[index]
    factor = config.vae_downsample_factor[0] * config.patch_size
    return ImageInfo(height, width, height // factor, width // factor, config.image_base_size, index, **flags)


class ChatTemplate(ABC):
    """Chat template of both published tokenizers."""

    @abstractmethod
    def ids(self, token: str) -> int:
        """Id of a special token."""

    @abstractmethod
    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text."""

    def apply_chat_template(
        self,
        batch_prompt: list[str] | None = None,
        mode: str = "gen_text",
        batch_gen_image_info: list[ImageInfo] | None = None,
        batch_system_prompt: list[str | None] | None = None,
        batch_cot_text: list[str] | None = None,
        max_length: int | None = None,
        bot_task: str = "auto",
        image_base_size: int | None = None,
        sequence_template: str = "pretrain",
        cfg_factor: int = 1,
        drop_think: bool = False,
    ) -> dict[str, Any]:
        assert mode == "gen_image"
        rows = [
            self._row(*each, sequence_template == "instruct", dropped)
            for dropped in range(cfg_factor)
            for each in zip(batch_prompt, batch_system_prompt, batch_gen_image_info, strict=True)
        ]
        total = max(len(ids) for ids, _ in rows)
        tokens = torch.tensor([ids + [self.ids("<pad>")] * (total - len(ids)) for ids, _ in rows])
        info = batch_gen_image_info[0]
        count = info.token_height * info.token_width
        slices = [[slice(places["img"], places["img"] + count)] for _, places in rows]
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        for row, (where,) in zip(mask, slices, strict=True):
            row[where] = True

        def index(name: str) -> Tensor | None:
            return torch.tensor([[places[name]] for _, places in rows]) if name in rows[0][1] else None

        names = ("timestep", "guidance", "timestep_r")
        return {"output": TokenizerEncodeOutput(tokens, slices, mask, *map(index, names)), "sections": []}

    def _row(
        self, prompt: str, system_prompt: str | None, info: ImageInfo, instruct: bool, dropped: bool
    ) -> tuple[list[int], dict[str, int]]:
        text = self.text_ids(prompt)
        text = [self.ids("<cfg>")] * len(text) if dropped else text
        before, between, after = ("User:", "Assistant: <answer>", "</answer>") if instruct else ("", "", "")
        ids = [self.ids("<bos>"), *self.text_ids(system_prompt or ""), *self.text_ids(before), *text, *self.text_ids(between)]
        ids += [self.ids("<boi>"), self.ids(f"<img_size_{info.base_size}>"), self.ids(f"<img_ratio_{info.ratio_index}>")]
        places = {}
        extra = {"timestep": True, "guidance": info.add_guidance_token, "timestep_r": info.add_timestep_r_token}
        for name in (name for name, wanted in extra.items() if wanted):
            places[name] = len(ids)
            ids.append(self.ids(f"<{name}>"))
        places["img"] = len(ids)
        ids += [self.ids("<img>")] * (info.token_height * info.token_width) + [self.ids("<eoi>"), *self.text_ids(after)]
        return ids, places


def attention_mask(output: TokenizerEncodeOutput) -> Tensor:
    rows, length = output.tokens.shape
    mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(rows, 1, 1)
    for row, (where,) in zip(mask, output.gen_image_slices, strict=True):
        row[where, where] = True
    return mask[:, None]
