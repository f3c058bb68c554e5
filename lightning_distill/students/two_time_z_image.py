"""Z-Image.

Every exported student contains a copy of this file. It imports only torch, diffusers and sibling files, and runs without this
package.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.transformers.transformer_z_image import TimestepEmbedder
from torch import Tensor, nn

from .few_step import FewStepPipeline
from .two_time import ATTENTION, TwoTimeEmbedding, TwoTimeModel


class ZImageTimeProjection(nn.Module):
    """Z-Image's original time features; its time increases from noise to image.

    Args:
        stock: Embedder that the features are from.
        scale: Factor of the embedder's times.
    """

    def __init__(self, stock: Any, scale: float) -> None:
        super().__init__()
        self.channels: int = stock.frequency_embedding_size
        self.features = stock.timestep_embedding
        self.scale = scale

    def forward(self, t: Tensor) -> Tensor:
        """Compute features (B, channels) of times (B,) in [0, 1]."""
        result: Tensor = self.features((1 - t) * self.scale, self.channels)
        return result


class TwoTimeZImageEmbedding(TwoTimeEmbedding):
    """`TwoTimeEmbedding` with the stock embedder's weight names."""

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
    """Z-Image transformer with a second time input; latents and prompts are those of the stock class."""

    _keep_in_fp32_modules: ClassVar[list[str]] = ["t_embedder"]
    lora_targets: ClassVar[tuple[str, ...]] = (*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

    def embedder_class(self, name: str) -> type[TwoTimeEmbedding] | None:
        """Class that replaces a module with this name in its parent, or None."""
        return TwoTimeZImageEmbedding if name == "t_embedder" else None

    def time_features(self, embedder: str) -> nn.Module:
        """Original features of the stock class's embedder, for times in [0, 1]."""
        return ZImageTimeProjection(self.get_submodule(embedder), self.t_scale)

    def stock_time_arguments(self, t: Tensor, r: Tensor) -> dict[str, Tensor]:
        """Convert times to arguments of the stock forward."""
        return {"t": 1 - t}

    def stock_time_features(self, embedder: str, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Features (N, F) that the stock pipeline computes for its embedder, of unrounded timesteps (N,) in [0, 1000]."""
        channels = self.get_submodule(embedder).layers[0].in_features
        features: Tensor = TimestepEmbedder.timestep_embedding((1000 - timesteps) / 1000 * self.t_scale, channels)
        return features


class TwoTimeZImagePipeline(FewStepPipeline, ZImagePipeline):
    """Z-Image in a few steps."""

    stock_class = ZImagePipeline
    network_class = TwoTimeZImageTransformer2DModel
    condition_names: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_embeds_mask")

    @classmethod
    def stock_guidance(cls, guidance_scale: float, embeds_guidance: bool) -> dict[str, Any]:
        """Guidance arguments of a teacher's stock pipeline, in which a scale of 0 means no guidance."""
        return {"guidance_scale": guidance_scale - 1}

    def encode_condition(self, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
        """`prompt_embeds` (B, L, D) of the language model and `prompt_embeds_mask` (B, L), true at tokens of the prompt."""
        # A copy, because the stock method writes its template into the list.
        embeds = self._encode_prompt([*prompts], max_sequence_length=max_sequence_length)
        padded = torch.stack([F.pad(each, (0, 0, 0, max_sequence_length - len(each))) for each in embeds])
        lengths = torch.tensor([len(each) for each in embeds], device=padded.device)
        mask = torch.arange(max_sequence_length, device=padded.device) < lengths[:, None]
        return {"prompt_embeds": padded, "prompt_embeds_mask": mask}

    def network_inputs(
        self, x_t: Tensor, condition: dict[str, Tensor], guidance_scale: Tensor | None, network: TwoTimeModel
    ) -> dict[str, Any]:
        """Arguments of the transformer, without the times."""
        prompts = zip(condition["prompt_embeds"], condition["prompt_embeds_mask"], strict=True)
        return {"x": list(x_t[:, :, None].unbind()), "cap_feats": [each[mask] for each, mask in prompts]}

    def velocity_from_output(self, output: Any, height: int, width: int) -> Tensor:
        """Velocity (B, C, height, width) from the transformer's output."""
        # The model's velocity points from noise to image.
        return -torch.stack(output)[:, :, 0]
