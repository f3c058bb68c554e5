"""Pipelines on fake tensors: components with the shapes and dtypes of a pipeline, but no values."""

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
SHIPPED_CONFIGS = {"black-forest-labs/FLUX.1-dev": "FLUX.1-dev"}
"""Hub ids of pipelines whose configurations ship with the package, and their folders."""


def pipeline_config_directory(pretrained: str, revision: str | None, model_config: str | None) -> Path:
    """Directory with the configurations of a pipeline's components.

    Args:
        pretrained: Setting `adapter.pretrained`.
        revision: Setting `adapter.revision`.
        model_config: Directory to use in place of `pretrained`. Weights and tokenizers may be missing there.

    Raises:
        ConfigurationError: If there is no such directory on this machine.
    """
    directory = Path(model_config or resolve_pretrained(pretrained))
    if (directory / "model_index.json").is_file():
        return directory
    if model_config is not None:
        raise ConfigurationError(
            f"model_config is {model_config!r}, which has no model_index.json; set it to a diffusers pipeline directory, whose "
            "weights may be missing"
        )
    cached = try_to_load_from_cache(pretrained, "model_index.json", revision=revision)
    if isinstance(cached, str):
        return Path(cached).parent
    if pretrained in SHIPPED_CONFIGS:
        return _BUILT_IN / SHIPPED_CONFIGS[pretrained]
    raise ConfigurationError(
        f"adapter.pretrained is {pretrained!r}, whose configuration is not on this machine; download the pipeline's .json "
        f"files and set --model_config to their directory, or plan for {', '.join(SHIPPED_CONFIGS)}"
    )


def attach_fake_pipeline(adapter: DiffusersAdapter, directory: Path, mode: FakeTensorMode) -> None:
    """Attach the components of a pipeline on fake tensors to an adapter, in place of `load`.

    Raises:
        ConfigurationError: If the configuration of a component is missing.
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
            # `nn.Module.to`, because the override in diffusers warns that time embedders remain in float32.
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
            f"{folder}/config.json cannot be read; set --model_config to a directory that contains it"
        ) from error
    with torch.device("meta"):
        return getattr(transformers, kind)(config)


def _tokenizer(folder: Path, kind: str) -> Any:
    if folder.is_dir():
        return getattr(transformers, kind).from_pretrained(folder)
    if kind in _PROMPT_LENGTHS:
        return FixedLengthTokenizer(_PROMPT_LENGTHS[kind])
    raise ConfigurationError(
        f"{folder} is missing, and the length of prompts depends on its {kind}; download the tokenizer's files as well"
    )


_PROMPT_LENGTHS = {"CLIPTokenizer": 77, "T5TokenizerFast": 512}
"""Number of tokens that text-to-image pipelines pad prompts to, by tokenizer class."""


class FixedLengthTokenizer:
    """Returns token ids of a tokenizer's shape, all of one token.

    Args:
        model_max_length: Default number of tokens per prompt.
    """

    def __init__(self, model_max_length: int) -> None:
        self.model_max_length = model_max_length

    def __call__(self, text: str | list[str], max_length: int | None = None, **_: Any) -> transformers.BatchEncoding:
        """Ids (B, L) of B prompts, and their attention mask."""
        rows = 1 if isinstance(text, str) else len(text)
        ids = torch.zeros(rows, max_length or self.model_max_length, dtype=torch.long)
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def tokenize(self, text: str) -> list[str]:
        """No tokens: pipelines look for trained tokens here."""
        return []

    def batch_decode(self, ids: torch.Tensor) -> list[str]:
        """Empty texts: pipelines report truncated prompts from them."""
        return [""] * len(ids)


@torch.no_grad()
def to_fake(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Replace the parameters, buffers and tensor attributes of a module, on any device, by fake tensors on the CPU."""
    fake_parameters: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None or is_fake(parameter):
                continue
            if id(parameter) not in fake_parameters:
                fake_parameters[id(parameter)] = nn.Parameter(_fake(parameter, mode), requires_grad=parameter.requires_grad)
            part._parameters[name] = fake_parameters[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None and not is_fake(buffer):
                part._buffers[name] = _fake(buffer, mode)
        for name, value in list(vars(part).items()):  # tensors that are not registered as buffers
            if isinstance(value, torch.Tensor) and value.is_meta:
                setattr(part, name, _fake(value, mode))
    return module


def is_fake(x: torch.Tensor) -> bool:
    """Whether a tensor, or the data of a parameter, is a fake tensor."""
    return isinstance(x, FakeTensor) or isinstance(x.data, FakeTensor)


def _fake(x: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    with mode:
        return torch.empty(x.shape, dtype=x.dtype, device="cpu")
