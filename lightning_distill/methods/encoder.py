"""Batches as the networks receive them: latents of their images and conditions of their prompts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.teachers.model_adapter import Condition, ModelAdapter

Batch = dict[str, Any]
"""`prompt`: B captions; `image` (B, 3, H, W) in [-1, 1], if there are images; `index` (B,), positions in the data set.

Precomputed data have `latents` (B, C, h, w) in place of `image`, and `condition`, the encoded captions.
"""


@runtime_checkable
class EncodedData(Protocol):
    """A DataModule whose batches hold conditions, so that no text encoder is loaded."""

    def check_encodings(self, settings: Mapping[str, Any]) -> None:
        """Raise `ConfigurationError` if encoders of other settings (`ModelAdapter.encoding_settings`) made them."""

    def encoded_prompts(self, prompts: Sequence[str]) -> Condition:
        """Conditions (B, ...) on the CPU of B validation prompts or empty prompts."""

    def check_known_prompts(self, prompts: Sequence[str]) -> None:
        """Raise `ConfigurationError` if the data do not hold the condition of a prompt."""


def encoded_data(trainer: Any) -> EncodedData | None:
    """The DataModule of a trainer, if its batches hold conditions."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, EncodedData) else None


class BatchEncoder:
    """Encodes batches, unless they come encoded, and caches what does not change.

    Args:
        adapter: Teacher family, which holds the text encoders and the autoencoder.
        device: Function that returns the device of the networks.
        cache_latents: Whether to cache the latents of each training image in memory.
        any_process: Function that returns whether a flag is set in any process that shares sharded networks, as
            `Networks.any_process`. Without it the flag itself counts.

    Attributes:
        trains_text_encoders: Whether the text encoders train; otherwise the empty prompt is encoded once.
        encoded: Data whose batches hold conditions, or None.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        device: Callable[[], torch.device],
        cache_latents: bool = False,
        any_process: Callable[[bool, torch.device], bool] = lambda flag, _: flag,
    ) -> None:
        self.adapter = adapter
        self.device = device
        self.cache_latents = cache_latents
        self.any_process = any_process
        self.trains_text_encoders = False
        self.encoded: EncodedData | None = None
        self._latent_cache: dict[int, Tensor] = {}
        self._null_condition: Condition | None = None

    def use_encoded_data(self, data: EncodedData | None) -> None:
        """Take conditions from the data, if they hold any.

        Raises:
            ConfigurationError: If the text encoders are to train, or encoders of other settings made the conditions.
        """
        self.encoded = data
        if data is None:
            return
        if self.trains_text_encoders:
            raise ConfigurationError(
                "model.train_text_encoders is true, and precomputed data hold conditions of fixed text encoders; set it to "
                "false, or train from images"
            )
        data.check_encodings(self.adapter.encoding_settings())

    def reset(self) -> None:
        """Drop the caches, because the data may have changed."""
        self._latent_cache.clear()
        self._null_condition = None

    def latents(self, batch: Batch, training: bool = False) -> Tensor:
        """Latents (B, C, h, w) of the images of a batch; those of a training batch are cached if `cache_latents` is set."""
        if "latents" in batch:
            latents: Tensor = batch["latents"]
            return latents
        return self._encode_images(batch, training)

    @torch.no_grad()
    def _encode_images(self, batch: Batch, training: bool) -> Tensor:
        indices = batch["index"].tolist() if self.cache_latents and training else []
        known = [self._latent_cache[index] for index in indices if index in self._latent_cache]
        complete = bool(indices) and len(known) == len(indices)
        # DeepSpeed gathers and traces the autoencoder: all processes encode, or none.
        if indices and not self.any_process(not complete, self.device()):
            return torch.stack(known)
        # The memory order decides which random number goes to which entry: it must not depend on the origin of the latents.
        latents = self.adapter.encode_images(batch["image"]).contiguous()
        self._latent_cache.update(zip(indices, latents.unbind() if indices else (), strict=True))
        return latents

    def no_latents(self, batch: Batch, latent_shape: tuple[int, ...]) -> Tensor:
        """NaN in place of latents (B, C, h, w) that the objective does not read: a loss that reads them shows it.

        Args:
            batch: The batch, whose images decide the shape if there are any.
            latent_shape: Shape (C, h, w) otherwise.
        """
        if "latents" in batch:
            latent_shape = tuple(batch["latents"].shape[1:])
        elif "image" in batch:
            latent_shape = self.adapter.latent_shape(*batch["image"].shape[-2:])
        return torch.full((len(batch["prompt"]), *latent_shape), torch.nan, device=self.device())

    def condition(self, batch: Batch) -> Condition:
        """Conditions of the prompts of a batch, which may hold them."""
        return batch["condition"] if "condition" in batch else self.encode_prompt(batch["prompt"])

    def encode_prompt(self, prompts: list[str]) -> Condition:
        """Conditions of B prompts, with gradients where the text encoders train.

        Raises:
            ConfigurationError: If precomputed data do not hold the condition of a prompt.
        """
        if self.encoded is not None:
            return {name: value.to(self.device()) for name, value in self.encoded.encoded_prompts(prompts).items()}
        with torch.set_grad_enabled(self.trains_text_encoders and torch.is_grad_enabled()):
            return self.adapter.encode_prompt(prompts)

    def null_condition(self, batch_size: int) -> Condition:
        """Condition of the empty prompt, in B rows."""
        known = self._null_condition
        if known is None or self.trains_text_encoders or next(iter(known.values())).device != self.device():
            # Equal for every caller: validation would encode it in inference mode, mixed precision in lower precision.
            with torch.inference_mode(False), torch.autocast(self.device().type, enabled=False):
                known = self._null_condition = self.encode_prompt([""])
        return {name: value.expand(batch_size, *value.shape[1:]) for name, value in known.items()}

    def set_null_condition(self, condition: Condition) -> None:
        """Use this condition (1, ...) for the empty prompt."""
        self._null_condition = condition
