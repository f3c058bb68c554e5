"""LoRA files with random weights for tiny transformers."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_distill.students.lora_student import lora_modules
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter

RANK = 2


def random_factors(directory: str, seed: int = 0, *further: str) -> dict[str, Tensor]:
    """LoRA weights for a pipeline's default LoRA targets and further layers, under diffusers' names."""
    adapter = DiffusersAdapter(directory)
    kind: Any = adapter.family.network_class
    with torch.device("meta"):
        network = kind.from_config(kind.load_config(directory, subfolder="transformer"))
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in (*lora_modules(network, network.lora_targets), *further):
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        found[f"transformer.{name}.lora_A.weight"] = 0.1 * torch.randn(RANK, layer.in_features, generator=generator)
        found[f"transformer.{name}.lora_B.weight"] = 0.1 * torch.randn(layer.out_features, RANK, generator=generator)
    return found


def save_lora(weights: dict[str, Tensor], file: Path) -> str:
    """Write weights to a safetensors file and return its path."""
    save_file({name: value.contiguous() for name, value in weights.items()}, file, {"format": "pt"})
    return str(file)


def to_kohya(weights: dict[str, Tensor], layers: dict[str, str], alpha: float) -> dict[str, Tensor]:
    """The factors of some layers under kohya's names, by the layers' names in diffusers and in kohya's files."""
    found = {}
    for name, kohya in layers.items():
        found[f"lora_unet_{kohya}.lora_down.weight"] = weights[f"transformer.{name}.lora_A.weight"]
        found[f"lora_unet_{kohya}.lora_up.weight"] = weights[f"transformer.{name}.lora_B.weight"]
        found[f"lora_unet_{kohya}.alpha"] = torch.tensor(alpha)
    return found
