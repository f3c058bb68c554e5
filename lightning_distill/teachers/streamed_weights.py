"""Stream weights from one set of files to another, one output file at a time."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

Read = Callable[[Iterable[str]], dict[str, Tensor]]
"""Reads the tensors of the given names; they may be flattened."""

DEFAULT_SHARD_SIZE = "5GB"
"""Largest size of an output file, by default."""


@dataclass(frozen=True)
class WeightStream:
    """Source of weights that are not in memory.

    Attributes:
        read: Reads weights by their names in the network.
        max_shard_size: Largest size of an output file.
    """

    read: Read
    max_shard_size: str


def stream_weights(network: Any, read: Read, max_shard_size: str) -> None:
    """Make `save_pretrained` of a network on the meta device write the weights from `read`.

    Args:
        network: A diffusers model whose parameters are on the meta device.
        read: Reads weights by their names in the network.
        max_shard_size: Largest size of an output file.
    """
    source = WeightStream(read, max_shard_size)

    def save_pretrained(save_directory: str | Path, **_: Any) -> None:
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        network.save_config(folder)
        save_safetensors(network.state_dict(), source, folder, "diffusion_pytorch_model")

    # A diffusers pipeline calls `save_pretrained` of each component; `weight_stream` reads the other attribute.
    vars(network).update(save_pretrained=save_pretrained, weight_stream=source)


def weight_stream(network: nn.Module) -> WeightStream:
    """Source of a network's weights: the argument of `stream_weights`, or else the network's parameters in memory."""
    state = network.state_dict()
    stream: WeightStream | None = vars(network).get("weight_stream")
    return stream or WeightStream(lambda names: {name: state[name] for name in names}, DEFAULT_SHARD_SIZE)


def save_safetensors(state: Mapping[str, Tensor], source: WeightStream, directory: Path, name: str) -> None:
    """Write safetensors files in the layout of diffusers and transformers, with an index if there are several files.

    Args:
        state: Tensors that give names, shapes and sizes; they may be on the meta device.
        source: Source of the values.
        directory: Output directory.
        name: File name without ".safetensors".
    """
    pattern = f"{name}{{suffix}}.safetensors"
    plan = split_torch_state_dict_into_shards(dict(state), filename_pattern=pattern, max_shard_size=source.max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        values = source.read(names)
        shaped = {each: values[each].reshape(state[each].shape).contiguous() for each in names}
        save_file(shaped, directory / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
