"""Build text encoders on the meta device, with the files from which shards of their weights are read."""

import json
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lightning_distill.errors import ConfigurationError
from lightning_distill.sharding.stored_weights import StoredWeights
from lightning_distill.teachers.sharded_loading import stored_component


def meta_encoder(pretrained: str, revision: str | None, name: str, dtype: torch.dtype) -> tuple[nn.Module, StoredWeights]:
    """Build a text encoder of a pipeline on the meta device, with the architecture and dtypes that transformers loads.

    Args:
        pretrained: Directory or hub id of the pipeline.
        revision: Revision of a hub id.
        name: Name of the component, such as `text_encoder_2`.
        dtype: Dtype of the weights, except those for which transformers requires float32.

    Returns:
        The encoder, with buffers on the CPU, and its stored weights by parameter name.

    Raises:
        ConfigurationError: If the weights are not in safetensors files, or some are missing.
    """
    weights, directory = stored_component(pretrained, revision, name)
    index = json.loads((directory.parent / "model_index.json").read_text())
    kind: Any = getattr(transformers, index[name][1])
    config = transformers.AutoConfig.from_pretrained(directory)
    with init_empty_weights(include_buffers=False):
        encoder = kind._from_config(config, dtype=dtype)
    encoder.tie_weights()
    float32_modules = encoder._get_dtype_plan(dtype)
    for path, parameter in encoder.named_parameters():
        if any(part in float32_modules for part in path.split(".")):
            parameter.data = parameter.data.float()
    stored_names = _stored_names(encoder, weights)
    if missing := [path for path, _ in encoder.named_parameters() if path not in stored_names]:
        raise ConfigurationError(
            f"adapter.pretrained is {pretrained!r}, whose {name} cannot be read in shards: its files lack {missing[0]} and "
            f"{len(missing) - 1} more weights; load and save it once with transformers {transformers.__version__}"
        )
    return encoder, weights.renamed(stored_names)


def _stored_names(encoder: Any, weights: StoredWeights) -> dict[str, str]:
    """Names of stored weights by parameter name; checkpoints may have the names of earlier transformers versions."""
    transforms = get_model_conversion_mapping(encoder)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    names, found = encoder.state_dict(), {}
    for stored in weights.names():
        name, converter = rename_source_key(stored, renamings, converters, encoder.base_model_prefix, names)
        if converter is None:  # a converter merges several stored weights into one
            found[name] = stored
    for name, source in encoder.all_tied_weights_keys.items():  # a checkpoint may store either of two tied weights
        for one, other in ((name, source), (source, name)):
            if one not in found and other in found:
                found[one] = found[other]
    return found
