"""Models of transformers on the meta device, and the names that their stored weights may have."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def meta_model(kind: Any, directory: Path, dtype: torch.dtype) -> Any:
    """Build a model of transformers on the meta device.

    Args:
        kind: Class of the model.
        directory: Directory of its configuration.
        dtype: Dtype of the weights, except those for which transformers requires float32.
    """
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = kind._from_config(config, dtype=dtype)
    model.tie_weights()
    float32_modules = model._get_dtype_plan(dtype)
    for path, parameter in model.named_parameters():
        if any(part in float32_modules for part in path.split(".")):
            parameter.data = parameter.data.float()
    return model


def stored_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Names of stored weights by parameter name; checkpoints may have the names of earlier transformers versions.

    Args:
        model: A model of transformers.
        stored: Names of the stored weights.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [rule for rule in transforms if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in transforms if isinstance(rule, WeightConverter)]
    names, found = model.state_dict(), {}
    for each in stored:
        name, converter = rename_source_key(each, renamings, converters, model.base_model_prefix, names)
        if converter is None:  # a converter merges several stored weights into one
            found[name] = each
    for name, source in model.all_tied_weights_keys.items():  # a checkpoint may store either of two tied weights
        for one, other in ((name, source), (source, name)):
            if one not in found and other in found:
                found[one] = found[other]
    return found
