"""Z-Image.

This file imports torch, diffusers and siblings that travel with it: it is part of every exported student and must run without
this package.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from .few_step import FewStepPipeline
from .two_time import ATTENTION, TwoTimeEmbedding, TwoTimeModel


class ZImageTimeProjection(nn.Module):
    """Z-Image's own features of time, which it counts from noise to picture.

    Args:
        stock: The embedder that they are from.
        scale: Of its times.
    """

    def __init__(self, stock: Any, scale: float) -> None:
        super().__init__()
        self.channels: int = stock.frequency_embedding_size
        self.features = stock.timestep_embedding
        self.scale = scale

    def forward(self, t: Tensor) -> Tensor:
        """Features (B, channels) of times (B,) in [0, 1]."""
        result: Tensor = self.features((1 - t) * self.scale, self.channels)
        return result


class TwoTimeZImageEmbedding(TwoTimeEmbedding):
    """The same as its base class, with the weights under the stock embedder's names."""

    def __init__(self, like: Any, *settings: Any) -> None:
        first, _, last = like.mlp
        super().__init__(TimestepEmbedding(first.in_features, first.out_features, out_dim=last.out_features), *settings)
        self.mlp = nn.Sequential(self.linear_1, self.act, self.linear_2)
        del self.linear_1, self.act, self.linear_2

    @property
    def layers(self) -> tuple[nn.Linear, nn.Module, nn.Linear]:
        """First layer, activation and last layer."""
        first, activation, last = self.mlp
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        return first, activation, last


class TwoTimeZImageTransformer2DModel(TwoTimeModel, ZImageTransformer2DModel):
    """Z-Image transformer with a second time input; latents and prompts go in as in the stock one."""

    _keep_in_fp32_modules: ClassVar[list[str]] = ["t_embedder"]
    lora_targets: ClassVar[tuple[str, ...]] = (*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

    def embedding_of(self, name: str) -> type[TwoTimeEmbedding] | None:
        """What replaces a module of this name within its parent; None leaves it."""
        return TwoTimeZImageEmbedding if name == "t_embedder" else None

    def own_features(self, embedder: str) -> nn.Module:
        """The features of times in [0, 1] that the stock class gives to its embedder."""
        return ZImageTimeProjection(self.get_submodule(embedder), self.t_scale)

    def stock_times(self, t: Tensor, r: Tensor) -> dict[str, Tensor]:
        """Times as arguments of the stock forward."""
        return {"t": 1 - t}


class TwoTimeZImagePipeline(FewStepPipeline, ZImagePipeline):
    """Z-Image in a few steps."""

    stock_class = ZImagePipeline
    network_class = TwoTimeZImageTransformer2DModel

    @classmethod
    def stock_guidance(cls, guidance_scale: float, embeds_guidance: bool) -> dict[str, Any]:
        """Arguments by which the stock pipeline guides a teacher; it counts from 0."""
        return {"guidance_scale": guidance_scale - 1}

    def encode_condition(self, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
        """`prompt_embeds` (B, L, D) of the language model and `prompt_embeds_mask` (B, L), true where there is a token."""
        # a copy: the stock method writes its template into the list
        embeds = self._encode_prompt([*prompts], max_sequence_length=max_sequence_length)
        padded = torch.stack([F.pad(each, (0, 0, 0, max_sequence_length - len(each))) for each in embeds])
        lengths = torch.tensor([len(each) for each in embeds], device=padded.device)
        mask = torch.arange(max_sequence_length, device=padded.device) < lengths[:, None]
        return {"prompt_embeds": padded, "prompt_embeds_mask": mask}

    def network_inputs(
        self, x_t: Tensor, condition: dict[str, Tensor], guidance_scale: Tensor | None, network: TwoTimeModel
    ) -> dict[str, Any]:
        """Arguments of the transformer, but for the times."""
        prompts = zip(condition["prompt_embeds"], condition["prompt_embeds_mask"], strict=True)
        return {"x": list(x_t[:, :, None].unbind()), "cap_feats": [each[mask] for each, mask in prompts]}

    def velocity_of(self, output: Any, height: int, width: int) -> Tensor:
        """Velocity (B, C, height, width) of what the transformer returns."""
        # The model's velocity points from noise to picture.
        return -torch.stack(output)[:, :, 0]
