"""How HunyuanImage 3.0 lays out prompts and pictures as one sequence of tokens.

A sequence is ``<bos> template and prompt <boi> <size> <ratio> <timestep> [<guidance>] [<timestep_r>] <img>... <eoi>``. The ids
are those of the published tokenizer; this file cuts its sequences before ``<boi>`` and puts them together again, since a prompt
is encoded before the size of its picture is known.

This file imports torch only: it travels with every exported student and must run without this package.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EMPTY = "<cfg>"
"""What stands for the text of an empty prompt: the token that the published code has for each token of a dropped one."""


@dataclass(frozen=True)
class ImageTokens:
    """The tokens from ``<boi>`` to ``<eoi>`` of a picture, the same for every prompt.

    Attributes:
        ids: (M,).
        image: Places of the image tokens, counted from ``<boi>``.
        shape: Rows and columns of image tokens.
        timestep: Place of the token that holds t.
        guidance: Of the one that holds the guidance scale, or None.
        timestep_r: Of the one that holds r, or None.
    """

    ids: Tensor
    image: slice
    shape: tuple[int, int]
    timestep: int
    guidance: int | None
    timestep_r: int | None


@dataclass(frozen=True)
class Sequence:
    """B sequences of S tokens, each with one picture; rows end in padding, which no token before it attends to.

    Attributes:
        input_ids: (B, S).
        attention_mask: (B, 1, S, S), true where the row attends to the column: causal, and both ways within a picture.
        position_ids: (B, S).
        image_mask: (B, S), true at image tokens.
        timestep_index: (B, 1), place of the token that holds t.
        guidance_index: Likewise of the guidance scale, or None.
        timestep_r_index: Likewise of r, or None.
        rope_image_info: Place and shape of each picture, for the rotary embedding in two dimensions.
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
    """Sequences of prompts and pictures, by the published tokenizer and image processor.

    Args:
        tokenizer: Of the published code, in its older form (`TokenizerWrapper`) or its newer one.
        image_processor: Of the published code.
        config: Of the model.
        sequence_template: "pretrain": the prompt as it is. "instruct": as a turn of a conversation.
        system_prompt: Text in front of every prompt, or None.
        max_sequence_length: Tokens in front of the picture; longer prompts are cut.
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
        self._pictures: dict[tuple[int, int], ImageTokens] = {}

    def condition(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """What the sequences of B prompts hold in front of their pictures.

        Returns:
            `prompt_ids` (B, L); `null_ids` (B, L), the same with ``<cfg>`` for each token of the prompt, as the published
            code has it in the second branch of guidance; and `prompt_length` (B,), the tokens that count.
        """
        size = self.config.image_base_size
        output = self._encode([prompt or EMPTY for prompt in prompts], self._image_info(size, size))
        rows = [
            self._cut(*(tokens[: _first(tokens, self.tokenizer.boi_token_id)] for tokens in pair))
            for pair in zip(*output.tokens.split(len(prompts)), strict=True)
        ]
        length = self.max_sequence_length
        ids, null_ids = (
            torch.stack([F.pad(row[i], (0, length - len(row[i])), value=self.tokenizer.pad_token_id) for row in rows])
            for i in range(2)
        )
        lengths = torch.tensor([len(row[0]) for row in rows])
        return {"prompt_ids": ids.to(device), "null_ids": null_ids.to(device), "prompt_length": lengths.to(device)}

    def _cut(self, ids: Tensor, null_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Leave out the end of a prompt that is too long, and keep the template around it."""
        excess = len(ids) - self.max_sequence_length
        if excess <= 0:
            return ids, null_ids
        text = (null_ids == self.tokenizer.cfg_token_id).nonzero()[:, 0]
        if excess >= len(text):
            raise ValueError(
                f"the template and the system prompt alone take {len(ids) - len(text)} tokens, and sequences have "
                f"{self.max_sequence_length} in front of a picture; allow more"
            )
        keep = torch.ones_like(ids, dtype=torch.bool)
        keep[text[-excess:]] = False
        return ids[keep], null_ids[keep]

    def picture(self, height: int, width: int) -> ImageTokens:
        """The tokens of a picture of height x width pixels.

        Raises:
            ValueError: If the checkpoint has no such size.
        """
        known = self._pictures.get((height, width))
        if known is None:
            known = self._pictures[height, width] = self._read_image(height, width)
        return known

    def _read_image(self, height: int, width: int) -> ImageTokens:
        info = self._image_info(height, width)
        if (info.image_height, info.image_width) != (height, width):
            raise ValueError(
                f"images of {height} x {width} do not fit; the nearest size that this checkpoint draws is "
                f"{info.image_height} x {info.image_width}"
            )
        output = self._encode([EMPTY], info)
        ids = output.tokens[0]
        start = _first(ids, self.tokenizer.boi_token_id)
        (image,) = output.gen_image_slices[0]

        def place(name: str) -> int | None:
            index = getattr(output, name, None)
            return None if index is None else int(index[0, -1]) - start

        timestep = place("gen_timestep_scatter_index")
        assert timestep is not None
        return ImageTokens(
            ids=ids[start : _first(ids, self.tokenizer.eoi_token_id) + 1],
            image=slice(image.start - start, image.stop - start),
            shape=(info.token_height, info.token_width),
            timestep=timestep,
            guidance=place("guidance_scatter_index"),
            timestep_r=place("gen_timestep_r_scatter_index"),
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
        """Sequences (2 B, S) of B prompts, the second half without their texts."""
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
        """The sequences of prompts and pictures of height x width pixels.

        Args:
            condition: Of `condition`, B rows.
            height: Pixels.
            width: Likewise.
        """
        prompt_ids, lengths = condition["prompt_ids"], condition["prompt_length"]
        picture, device = self.picture(height, width), prompt_ids.device
        total = prompt_ids.shape[1] + len(picture.ids)
        position = torch.arange(total, device=device).expand(len(prompt_ids), total)
        place = position - lengths[:, None]  # counted from <boi>
        pad = self.tokenizer.pad_token_id
        prompt = F.pad(prompt_ids, (0, len(picture.ids)), value=pad)
        ids = picture.ids.to(device)[place.clamp(0, len(picture.ids) - 1)]
        ids = torch.where(place < 0, prompt, torch.where(place < len(picture.ids), ids, pad))
        image = (place >= picture.image.start) & (place < picture.image.stop)
        causal = torch.ones(total, total, dtype=torch.bool, device=device).tril()

        def index(place: int | None) -> Tensor | None:
            return None if place is None else (lengths + place)[:, None]

        starts = (lengths + picture.image.start).tolist()
        count = picture.image.stop - picture.image.start
        return Sequence(
            input_ids=ids,
            attention_mask=(causal | (image[:, :, None] & image[:, None]))[:, None],
            position_ids=position,
            image_mask=image,
            timestep_index=(lengths + picture.timestep)[:, None],
            guidance_index=index(picture.guidance),
            timestep_r_index=index(picture.timestep_r),
            rope_image_info=[[(slice(start, start + count), picture.shape)] for start in starts],
        )


def _first(ids: Tensor, token: int) -> int:
    """Place of the first such token of a sequence (S,)."""
    return int((ids == token).nonzero()[0, 0])
