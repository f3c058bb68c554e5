"""Token layout of HunyuanImage 3.0: prompts and images as one sequence of tokens.

A sequence is ``<bos> template and prompt <boi> <size> <ratio> <timestep> [<guidance>] [<timestep_r>] <img>... <eoi>``. The ids
are those of the published tokenizer. This file splits its sequences before ``<boi>`` and joins the parts later: prompts are
encoded before the image size is known.

Every exported student contains a copy of this file. It imports only torch, and runs without this package.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EMPTY = "<cfg>"
"""Text of an empty prompt: the token that the published code substitutes for each token of a dropped prompt."""


@dataclass(frozen=True)
class ImageTokens:
    """Tokens of an image, from ``<boi>`` to ``<eoi>``; they are the same for every prompt.

    Attributes:
        ids: Token ids, (M,).
        image: Positions of the image tokens, relative to ``<boi>``.
        shape: Rows and columns of image tokens.
        timestep: Position of the token for t, relative to ``<boi>``.
        guidance: Position of the token for the guidance scale, or None.
        timestep_r: Position of the token for r, or None.
    """

    ids: Tensor
    image: slice
    shape: tuple[int, int]
    timestep: int
    guidance: int | None
    timestep_r: int | None


@dataclass(frozen=True)
class Sequence:
    """B sequences of S tokens with one image each. They end in padding, which no earlier token attends to.

    Attributes:
        input_ids: (B, S).
        attention_mask: (B, 1, S, S), true where the row attends to the column: causal, and bidirectional within an image.
        position_ids: (B, S).
        image_mask: (B, S), true at image tokens.
        timestep_index: (B, 1), position of the token for t.
        guidance_index: (B, 1), position of the token for the guidance scale, or None.
        timestep_r_index: (B, 1), position of the token for r, or None.
        rope_image_info: Position and shape of each image, for the two-dimensional rotary embedding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    image_mask: Tensor
    timestep_index: Tensor
    guidance_index: Tensor | None
    timestep_r_index: Tensor | None
    rope_image_info: list[list[tuple[slice, tuple[int, int]]]]


class TokenLayout:
    """Builds sequences of prompts and images with the published tokenizer and image processor.

    Args:
        tokenizer: Tokenizer of the published code, in the older version (`TokenizerWrapper`) or the newer one.
        image_processor: Image processor of the published code.
        config: Configuration of the model.
        sequence_template: "pretrain" for the plain prompt, "instruct" for a turn of a conversation.
        system_prompt: Text before every prompt, or None.
        max_sequence_length: Number of tokens before the image; longer prompts are truncated.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        config: Any,
        sequence_template: str,
        system_prompt: str | None,
        max_sequence_length: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config
        self.sequence_template = sequence_template
        self.system_prompt = system_prompt
        self.max_sequence_length = max_sequence_length
        self._image_tokens: dict[tuple[int, int], ImageTokens] = {}

    def condition(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """Tokenize B prompts: the part of their sequences before the image.

        Returns:
            `prompt_ids` (B, L), `null_ids` (B, L) and `prompt_length` (B,), the number of tokens without padding. `null_ids`
            has ``<cfg>`` in place of each token of the prompt, as in the published code's second branch of guidance.
        """
        size = self.config.image_base_size
        output = self._encode([prompt or EMPTY for prompt in prompts], self._image_info(size, size))
        rows = [
            self._truncate(*(tokens[: _first(tokens, self.tokenizer.boi_token_id)] for tokens in pair))
            for pair in zip(*output.tokens.split(len(prompts)), strict=True)
        ]
        length = self.max_sequence_length
        ids, null_ids = (
            torch.stack([F.pad(row[i], (0, length - len(row[i])), value=self.tokenizer.pad_token_id) for row in rows])
            for i in range(2)
        )
        lengths = torch.tensor([len(row[0]) for row in rows])
        return {"prompt_ids": ids.to(device), "null_ids": null_ids.to(device), "prompt_length": lengths.to(device)}

    def _truncate(self, ids: Tensor, null_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Truncate a prompt that is too long; the template around it is unchanged."""
        excess = len(ids) - self.max_sequence_length
        if excess <= 0:
            return ids, null_ids
        text = (null_ids == self.tokenizer.cfg_token_id).nonzero()[:, 0]
        if excess >= len(text):
            raise ValueError(
                f"max_sequence_length is {self.max_sequence_length}, and the template and the system prompt alone have "
                f"{len(ids) - len(text)} tokens; increase max_sequence_length"
            )
        selected = torch.ones_like(ids, dtype=torch.bool)
        selected[text[-excess:]] = False
        return ids[selected], null_ids[selected]

    def image_tokens(self, height: int, width: int) -> ImageTokens:
        """Tokens of an image of height x width pixels.

        Raises:
            ValueError: If the checkpoint does not support this size.
        """
        tokens = self._image_tokens.get((height, width))
        if tokens is None:
            tokens = self._image_tokens[height, width] = self._tokenize_image(height, width)
        return tokens

    def _tokenize_image(self, height: int, width: int) -> ImageTokens:
        info = self._image_info(height, width)
        if (info.image_height, info.image_width) != (height, width):
            raise ValueError(
                f"images of {height} x {width} do not fit; the nearest size of this checkpoint is "
                f"{info.image_height} x {info.image_width}"
            )
        output = self._encode([EMPTY], info)
        ids = output.tokens[0]
        start = _first(ids, self.tokenizer.boi_token_id)
        (image,) = output.gen_image_slices[0]

        def position(name: str) -> int | None:
            index = getattr(output, name, None)
            return None if index is None else int(index[0, -1]) - start

        timestep = position("gen_timestep_scatter_index")
        assert timestep is not None
        return ImageTokens(
            ids=ids[start : _first(ids, self.tokenizer.eoi_token_id) + 1],
            image=slice(image.start - start, image.stop - start),
            shape=(info.token_height, info.token_width),
            timestep=timestep,
            guidance=position("guidance_scatter_index"),
            timestep_r=position("gen_timestep_r_scatter_index"),
        )

    def _image_info(self, height: int, width: int) -> Any:
        processor, size = self.image_processor, (height, width)
        if hasattr(processor, "build_gen_image_info"):
            return processor.build_gen_image_info(
                size,
                add_guidance_token=bool(getattr(self.config, "cfg_distilled", False)),
                add_timestep_r_token=bool(getattr(self.config, "use_meanflow", False)),
            )
        return processor.build_image_info(size)

    def _encode(self, prompts: list[str], info: Any) -> Any:
        """Tokenize B prompts to sequences (2 B, S); the second half has null prompts."""
        return self.tokenizer.apply_chat_template(
            batch_prompt=prompts,
            mode="gen_image",
            batch_gen_image_info=[info] * len(prompts),
            batch_system_prompt=[self.system_prompt] * len(prompts),
            image_base_size=self.config.image_base_size,
            sequence_template=self.sequence_template,
            cfg_factor=2,
        )["output"]

    def sequence(self, condition: dict[str, Tensor], height: int, width: int) -> Sequence:
        """Build the sequences of prompts and images of height x width pixels.

        Args:
            condition: Result of `condition`, B rows.
            height: Height in pixels.
            width: Width in pixels.
        """
        prompt_ids, lengths = condition["prompt_ids"], condition["prompt_length"]
        tokens, device = self.image_tokens(height, width), prompt_ids.device
        total = prompt_ids.shape[1] + len(tokens.ids)
        position = torch.arange(total, device=device).expand(len(prompt_ids), total)
        offset = position - lengths[:, None]  # relative to <boi>
        pad = self.tokenizer.pad_token_id
        prompt = F.pad(prompt_ids, (0, len(tokens.ids)), value=pad)
        ids = tokens.ids.to(device)[offset.clamp(0, len(tokens.ids) - 1)]
        ids = torch.where(offset < 0, prompt, torch.where(offset < len(tokens.ids), ids, pad))
        image = (offset >= tokens.image.start) & (offset < tokens.image.stop)
        causal = torch.ones(total, total, dtype=torch.bool, device=device).tril()

        def index(offset: int | None) -> Tensor | None:
            return None if offset is None else (lengths + offset)[:, None]

        starts = (lengths + tokens.image.start).tolist()
        count = tokens.image.stop - tokens.image.start
        return Sequence(
            input_ids=ids,
            attention_mask=(causal | (image[:, :, None] & image[:, None]))[:, None],
            position_ids=position,
            image_mask=image,
            timestep_index=(lengths + tokens.timestep)[:, None],
            guidance_index=index(tokens.guidance),
            timestep_r_index=index(tokens.timestep_r),
            rope_image_info=[[(slice(start, start + count), tokens.shape)] for start in starts],
        )


def _first(ids: Tensor, token: int) -> int:
    """Position of the first occurrence of a token in a sequence (S,)."""
    return int((ids == token).nonzero()[0, 0])
