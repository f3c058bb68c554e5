"""Weights that go from one set of files to another, a file at a time."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

Read = Callable[[Iterable[str]], dict[str, Tensor]]
"""Tensors by name, possibly flattened."""

LARGEST_FILE = "5GB"
"""Of what is written, unless told otherwise."""


@dataclass(frozen=True)
class Stream:
    """Where the weights of a network are that has none in memory.

    Attributes:
        read: By the network's names.
        max_shard_size: Largest file that they are written to.
    """

    read: Read
    max_shard_size: str


def stream(network: Any, read: Read, max_shard_size: str) -> None:
    """Let a network without weights save those that are read, wherever it is saved."""
    source = Stream(read, max_shard_size)

    def save_pretrained(save_directory: str | Path, **_: Any) -> None:
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        network.save_config(folder)
        save_in_files(network.state_dict(), source, folder, "diffusion_pytorch_model")

    # Of these, a pipeline of diffusers calls the first for each of its components.
    vars(network).update(save_pretrained=save_pretrained, stream=source)


def stream_of(network: nn.Module) -> Stream:
    """Where a network's weights are: in its memory, unless `stream` says otherwise."""
    state = network.state_dict()
    known: Stream | None = vars(network).get("stream")
    return known or Stream(lambda names: {name: state[name] for name in names}, LARGEST_FILE)


def save_in_files(state: Mapping[str, Tensor], source: Stream, directory: Path, name: str) -> None:
    """Write safetensors as diffusers and transformers do, with an index if there are several files.

    Args:
        state: Names, shapes and sizes of what is written; its tensors may be without memory.
        source: Of the values.
        directory: Where to.
        name: Of the files, without ".safetensors".
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
