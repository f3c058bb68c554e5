"""A batch as networks see it: latents of its pictures and conditions of its prompts, and what is remembered of both."""

import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.condition import EncodedData
from lightning_distill.methods.evaluation import Batch, SamplingModule
from lightning_distill.methods.networks import GuidedNetworks
from lightning_distill.teachers.model_adapter import Condition


class BatchEncoding(SamplingModule, GuidedNetworks):
    """The part of `TeacherStudentBase` that encodes batches, unless they come encoded.

    Args:
        cache_latents: Whether to keep each training picture's latents in memory after its first visit.
    """

    train_text_encoders: bool = False
    """Whether the text encoders train along; else the empty prompt is encoded once."""

    def __init__(self, cache_latents: bool) -> None:
        super().__init__()
        self.cache_latents = cache_latents
        self._latent_cache: dict[int, Tensor] = {}
        self._null_condition: Condition | None = None
        self._encoded: EncodedData | None = None

    def use_encoded_data(self, data: EncodedData | None) -> None:
        """Take conditions from data that bring them along, if there are.

        Raises:
            ConfigurationError: If text encoders are to train, or others have made them.
        """
        self._encoded = data
        if data is None:
            return
        if self.train_text_encoders:
            raise ConfigurationError(
                "model.train_text_encoders is true, and precomputed data hold what the text encoders made before; set it to "
                "false, or train from pictures"
            )
        data.check_encodings(self.adapter.encoding_settings())

    def reset_data(self) -> None:
        """Start afresh, for data that may be others."""
        self._latent_cache.clear()
        self._null_condition = self._reference = None

    @torch.no_grad()
    def encode_images(self, batch: Batch) -> Tensor:
        """Latents (B, C, h, w) of a batch's pictures, from memory where they are kept."""
        places = batch["index"].tolist() if self.cache_latents and self.training else []
        if places and all(place in self._latent_cache for place in places):
            return torch.stack([self._latent_cache[place] for place in places])
        # The memory order decides which number of a random stream goes where: it must not depend on where latents are from.
        latents = self.adapter.encode_images(batch["image"]).contiguous()
        self._latent_cache.update(zip(places, latents.unbind() if places else (), strict=True))
        return latents

    def latents(self, batch: Batch) -> Tensor:
        """Latents (B, C, h, w) of a batch's pictures."""
        if "latents" in batch:
            latents: Tensor = batch["latents"]
            return latents
        return self.encode_images(batch) if "image" in batch else self.no_latents(batch)

    def no_latents(self, batch: Batch) -> Tensor:
        """What stands for latents (B, C, h, w) that nothing looks at: no numbers, which shows in a loss that used them."""
        shape = self.latent_shape
        if "latents" in batch:
            shape = tuple(batch["latents"].shape[1:])
        elif "image" in batch:
            shape = self.adapter.latent_shape(*batch["image"].shape[-2:])
        return torch.full((len(batch["prompt"]), *shape), torch.nan, device=self.device)

    def condition(self, batch: Batch) -> Condition:
        """Conditions of a batch's prompts, which it may bring along."""
        return batch["condition"] if "condition" in batch else self.encode_prompt(batch["prompt"])

    def encode_prompt(self, prompts: list[str]) -> Condition:
        """Conditions of B prompts, with gradients where the text encoders train; of precomputed data those that it has.

        Raises:
            ConfigurationError: If a prompt is not among those of precomputed data.
        """
        if self._encoded is not None:
            return {name: value.to(self.device) for name, value in self._encoded.encoded_prompts(prompts).items()}
        with torch.set_grad_enabled(self.train_text_encoders and torch.is_grad_enabled()):
            return self.adapter.encode_prompt(prompts)

    def null_condition(self, batch_size: int) -> Condition:
        """Condition of the empty prompt, in B rows."""
        known = self._null_condition
        if known is None or self.train_text_encoders or next(iter(known.values())).device != self.device:
            # The same whoever asks first: validation would make it in inference mode, mixed precision in lower precision.
            with torch.inference_mode(False), torch.autocast(self.device.type, enabled=False):
                known = self._null_condition = self.encode_prompt([""])
        return {name: value.expand(batch_size, *value.shape[1:]) for name, value in known.items()}
