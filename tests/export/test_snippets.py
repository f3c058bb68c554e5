"""Code of the model cards of stock pipelines, LoRA files and single files, run as it stands."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from lightning_distill.export.card import ModelCard
from lightning_distill.export.lora_layers import LoraLayers, save_lora_file
from lightning_distill.export.readme import write_card
from lightning_distill.export.single_file import save_single_file
from lightning_distill.export.tool_keys import Tool, save_tool_lora
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from tests.teachers.tiny_families import save_family

FAMILIES = ("flux", "flux2", "flux2_klein", "hunyuan_image", "qwen_image", "sana", "stable_diffusion_3", "z_image")
ATTENTION = {"sana": "transformer_blocks.0.attn1.to_q", "z_image": "layers.0.attention.to_q"}
WITH_ORIGINAL = ("stable_diffusion_3", "z_image")
SCHEDULER = {"class": "FlowMatchEulerDiscreteScheduler", "config": {"shift": 7.0}}


def export(family: str, kind: str, tmp_path: Path) -> tuple[str, Path]:
    """Write an export of a teacher with a card; returns the teacher and the export."""
    torch.manual_seed(0)
    base = str(save_family(family, tmp_path / "base"))
    pipeline = DiffusionPipeline.from_pretrained(base)
    adapter, directory = DiffusersAdapter(base), tmp_path / "export"
    adapter.check()
    adapter.load()
    name = type(pipeline).__name__
    card = ModelCard("TDM", base, (2,), 32, 32, pipeline_class=name, scheduler=SCHEDULER)
    layer = ATTENTION.get(family, "transformer_blocks.0.attn.to_q")
    out, width = pipeline.transformer.get_submodule(layer).weight.shape
    layers: LoraLayers = {layer: (torch.randn(2, width), torch.randn(out, 2))}
    transformer = type(pipeline.transformer).__name__
    if kind == "stock":
        pipeline.save_pretrained(directory)
    elif kind == "lora":
        save_lora_file(layers, directory)
    elif kind == "single_file":
        state = pipeline.transformer.state_dict()

        def read(names: Any) -> dict[str, Tensor]:
            return {each: state[each] for each in names}

        directory.mkdir()
        card = replace(card, file="transformer.safetensors")
        save_single_file(state, read, transformer, pipeline.transformer.config, directory / card.file)
    else:
        tool: Tool = "comfyui" if kind == "comfyui" else "kohya"
        directory.mkdir()
        save_tool_lora(layers, transformer, tool, directory / card.file)
    write_card(directory, card, kind, adapter.stock_arguments(1.0), adapter.export_code)
    return base, directory


def run(base: str, directory: Path) -> Any:
    """Run the code of a card; returns the image."""
    text = (directory / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    places = {"this/directory": str(directory), "a prompt": "a circle", json.dumps(Path(base).name): json.dumps(base)}
    for old, new in places.items():
        code = code.replace(old, new)
    exec(code, names)
    names["pipeline"].set_progress_bar_config(disable=True)
    return names


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["stock", "lora"])
def test_code_of_stock_pipelines_and_lora_runs(kind: str, family: str, tmp_path: Path) -> None:
    names = run(*export(family, kind, tmp_path))
    assert names["image"].size == (32, 32)
    adapters = getattr(names["pipeline"].transformer, "peft_config", {})
    assert len(adapters) == (kind == "lora")
    assert (names["pipeline"].scheduler.config.shift == 7.0) == (kind == "lora")


@pytest.mark.parametrize(
    ("kind", "family"),
    [("comfyui", "flux"), ("comfyui", "qwen_image"), ("kohya", "flux"), *(("single_file", family) for family in WITH_ORIGINAL)],
)
def test_code_of_files_of_other_tools_runs(kind: str, family: str, tmp_path: Path) -> None:
    base, directory = export(family, kind, tmp_path)
    names = run(base, directory)
    assert names["image"].size == (32, 32)
    assert names["pipeline"].scheduler.config.shift == 7.0
    assert "## Settings in ComfyUI" in (directory / "README.md").read_text()
