"""Build text encoders on the meta device, with the files from which shards of their weights are read."""

import json

import torch
import transformers
from torch import nn

from lightning_distill.errors import ConfigurationError, first_and_count
from lightning_distill.sharding.stored_weights import StoredWeights
from lightning_distill.teachers.meta_models import meta_model, stored_names
from lightning_distill.teachers.sharded_loading import stored_component


def meta_encoder(
    pretrained: str, revision: str | None, name: str, dtype: torch.dtype, variant: str | None = None
) -> tuple[nn.Module, StoredWeights]:
    """Build a text encoder of a pipeline on the meta device, with the architecture and dtypes that transformers loads.

    Args:
        pretrained: Directory or hub id of the pipeline.
        revision: Revision of a hub id.
        name: Name of the component, such as `text_encoder_2`.
        dtype: Dtype of the weights, except those for which transformers requires float32.
        variant: Preferred variant of the weights, such as "fp16".

    Returns:
        The encoder, with buffers on the CPU, and its stored weights by parameter name.

    Raises:
        ConfigurationError: If the weights are not in safetensors files, or some are missing.
    """
    weights, directory = stored_component(pretrained, revision, name, variant=variant)
    index = json.loads((directory.parent / "model_index.json").read_text())
    encoder = meta_model(getattr(transformers, index[name][1]), directory, dtype)
    found = stored_names(encoder, weights.names())
    if missing := [path for path, _ in encoder.named_parameters() if path not in found]:
        raise ConfigurationError(
            f"adapter.pretrained is {pretrained!r}, whose {name} cannot be read in shards: its files lack the weight "
            f"{first_and_count(missing)}; load and save it once with transformers {transformers.__version__}"
        )
    return encoder, weights.renamed(found)
