"""Pipelines without weights: components whose parameters have shapes and dtypes, and take no memory."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lightning_distill.errors import ConfigurationError
from lightning_distill.students.few_step import FewStepPipeline
from lightning_distill.teachers.diffusers_adapter import DTYPES, DiffusersAdapter
from lightning_distill.teachers.registry import resolve_pretrained

_BUILT_IN = Path(__file__).resolve().parent / "pipelines"
KNOWN = {"black-forest-labs/FLUX.1-dev": "FLUX.1-dev"}
"""Pipelines whose configurations ship with the package, by hub id."""


def description_directory(pretrained: str, revision: str | None, given: str | None) -> Path:
    """Where the configurations of a pipeline's components are.

    Args:
        pretrained: Of the adapter.
        revision: Likewise.
        given: A directory in the place of it; weights and tokenizers may be missing there.

    Raises:
        ConfigurationError: If there is none.
    """
    directory = Path(given or resolve_pretrained(pretrained))
    if (directory / "model_index.json").is_file():
        return directory
    if given is not None:
        raise ConfigurationError(
            f"model_config is {given!r}, which has no model_index.json; give a diffusers pipeline directory, whose weights "
            "may be missing"
        )
    cached = try_to_load_from_cache(pretrained, "model_index.json", revision=revision)
    if isinstance(cached, str):
        return Path(cached).parent
    if pretrained in KNOWN:
        return _BUILT_IN / KNOWN[pretrained]
    raise ConfigurationError(
        f"adapter.pretrained is {pretrained!r}, whose configuration is not on this machine; download the pipeline's .json "
        f"files and give their directory as --model_config, or plan for {', '.join(KNOWN)}"
    )


def attach_description(adapter: DiffusersAdapter, directory: Path, mode: FakeTensorMode) -> None:
    """Give an adapter the components of a pipeline without memory, in the place of `load`.

    Raises:
        ConfigurationError: If a component's configuration is missing.
    """
    index = json.loads((directory / "model_index.json").read_text())
    components: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        library, kind = value
        unused = name == "transformer" or kind is None
        components[name] = None if unused else _component(directory, name, library, kind)
    pipeline: FewStepPipeline = adapter.family(**components)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            # Past diffusers' own, which warns of embedders of time: they stay in float32 by themselves.
            to_fake(nn.Module.to(component, DTYPES[adapter.torch_dtype]), mode)
    adapter.attach(pipeline)


def _component(directory: Path, name: str, library: str, kind: str) -> Any:
    folder = directory / name
    if "okeniz" in kind or "rocessor" in kind:
        return _tokenizer(folder, kind)
    if library == "diffusers":
        cls = getattr(diffusers, kind)
        if "Scheduler" in kind:
            return cls.from_pretrained(folder)
        with torch.device("meta"):
            return cls.from_config(cls.load_config(folder))
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except OSError as error:
        raise ConfigurationError(
            f"{folder}/config.json cannot be read; give a directory that has it as --model_config"
        ) from error
    with torch.device("meta"):
        return getattr(transformers, kind)(config)


def _tokenizer(folder: Path, kind: str) -> Any:
    if folder.is_dir():
        return getattr(transformers, kind).from_pretrained(folder)
    if kind in _LENGTHS:
        return FixedLengthTokenizer(_LENGTHS[kind])
    raise ConfigurationError(
        f"{folder} is missing, and {kind} knows the length of prompts; download the tokenizer's files as well"
    )


_LENGTHS = {"CLIPTokenizer": 77, "T5TokenizerFast": 512}
"""Tokens that tokenizers of text-to-image pipelines pad prompts to."""


class FixedLengthTokenizer:
    """Gives token ids of the shape that a tokenizer would give, all of one token.

    Args:
        model_max_length: Tokens of a prompt, unless told otherwise.
    """

    def __init__(self, model_max_length: int) -> None:
        self.model_max_length = model_max_length

    def __call__(self, text: str | list[str], max_length: int | None = None, **_: Any) -> transformers.BatchEncoding:
        """Ids (B, L) of B prompts, and their mask."""
        rows = 1 if isinstance(text, str) else len(text)
        ids = torch.zeros(rows, max_length or self.model_max_length, dtype=torch.long)
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def tokenize(self, text: str) -> list[str]:
        """Of the search for trained tokens: there are none."""
        return []

    def batch_decode(self, ids: torch.Tensor) -> list[str]:
        """Of what pipelines say that they have cut off: nothing is."""
        return [""] * len(ids)


@torch.no_grad()
def to_fake(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Replace a module's parameters, buffers and tables, on whatever device, by ones on the CPU that have no memory."""
    known: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None or is_fake(parameter):
                continue
            if id(parameter) not in known:
                known[id(parameter)] = nn.Parameter(_fake(parameter, mode), requires_grad=parameter.requires_grad)
            part._parameters[name] = known[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None and not is_fake(buffer):
                part._buffers[name] = _fake(buffer, mode)
        for name, value in list(vars(part).items()):  # tables that are no buffers
            if isinstance(value, torch.Tensor) and value.is_meta:
                setattr(part, name, _fake(value, mode))
    return module


def is_fake(x: torch.Tensor) -> bool:
    """Whether a tensor has no memory."""
    return isinstance(x, FakeTensor) or isinstance(x.data, FakeTensor)


def _fake(x: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    with mode:
        return torch.empty(x.shape, dtype=x.dtype, device="cpu")
