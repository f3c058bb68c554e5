"""The LoRA file: every loader of diffusers gives the merged weights' outputs, for mixed ranks and next to another LoRA."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, HunyuanImagePipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn

from lightning_distill.export.lora_layers import lora_layers_of, save_lora_file
from lightning_distill.students.lora_student import ADAPTER, merge_lora_weights
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from tests.export.stock_transformers import linear_shapes, merged, random_layers, tiny_stock, without_warnings
from tests.teachers.tiny_families import FAMILIES
from tests.tiny import load_adapter, save_tiny_pipeline

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def load(pipeline: DiffusionPipeline, file: Path, name: str) -> None:
    """Load a LoRA as users do; HunyuanImage's pipeline has no method for it."""
    loader = pipeline.transformer.load_lora_adapter if type(pipeline) is HunyuanImagePipeline else pipeline.load_lora_weights
    with without_warnings():
        loader(str(file.parent), weight_name=file.name, adapter_name=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_file_equals_merged_weights(family: str, tmp_path: Path) -> None:
    """Alone, fused, and together with a LoRA of other layers and ranks."""
    pipeline, evaluate = tiny_stock(family)
    transformer = pipeline.transformer
    shapes = linear_shapes(transformer)
    layers, style = random_layers(shapes), random_layers(dict(list(shapes.items())[1::2]))
    expected, both = evaluate(merged(transformer, layers)), evaluate(merged(transformer, layers, style))
    before = evaluate(transformer)
    load(pipeline, save_lora_file(layers, tmp_path / "student"), "student")
    loaded = {name: part for name, part in transformer.named_modules() if isinstance(part, LoraLayer)}
    assert {name: set(part.scaling.values()) for name, part in loaded.items()} == {name: {1.0} for name in layers}
    torch.testing.assert_close(evaluate(transformer), expected, **CLOSE)
    assert (expected - before).abs().max() > 1e-2
    load(pipeline, save_lora_file(style, tmp_path / "style"), "style")
    owner = transformer if type(pipeline) is HunyuanImagePipeline else pipeline
    owner.set_adapters(["student", "style"], [1.0, 1.0])
    torch.testing.assert_close(evaluate(transformer), both, **CLOSE)
    owner.fuse_lora()
    torch.testing.assert_close(evaluate(transformer), both, **CLOSE)


def test_layers_of_a_student_are_its_updates(tmp_path: Path) -> None:
    adapter = load_adapter(save_tiny_pipeline(tmp_path))
    student, _ = adapter.build_student(adapter.load_teacher(), StudentOptions(lora=LoraOptions(rank=2, alpha=3.0)))
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    layers, weights = lora_layers_of(student), merge_lora_weights(student).state_dict()
    base = {name.replace(".base_layer", ""): value for name, value in student.state_dict().items()}
    assert layers
    assert layers.keys() <= dict(tiny_stock("flux")[0].transformer.named_modules()).keys()
    for name, (a, b) in layers.items():
        assert a.dtype is b.dtype is torch.float32
        torch.testing.assert_close(base[f"{name}.weight"] + b @ a, weights[f"{name}.weight"])


def test_layers_with_ranks_and_scales_of_their_own() -> None:
    network = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["0", "1"], rank_pattern={"1": 3}, alpha_pattern={"1": 6})
    inject_adapter_in_model(config, network, ADAPTER)
    nn.init.normal_(network[0].lora_B[ADAPTER].weight)
    nn.init.normal_(network[1].lora_B[ADAPTER].weight)
    layers = lora_layers_of(network)
    assert [len(a) for a, _ in layers.values()] == [2, 3]
    for name, (a, b) in layers.items():
        torch.testing.assert_close(b @ a, network[int(name)].get_delta_weight(ADAPTER))


def test_header_gives_each_layer_its_rank_and_the_scale_one(tmp_path: Path) -> None:
    """Older readers know neither without it. Names that end alike have patterns of their own."""
    layers = random_layers(dict.fromkeys(["proj_out", "blocks.0.proj_out", "blocks.1.proj_out", "blocks.10.proj_out"], (4, 4)))
    with safe_open(save_lora_file(layers, tmp_path), framework="pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    config = LoraConfig(**{name.removeprefix("transformer."): value for name, value in header.items()})
    network = nn.ModuleDict(
        {
            "blocks": nn.ModuleList([nn.ModuleDict({"proj_out": nn.Linear(4, 4)}) for _ in range(12)]),
            "proj_out": nn.Linear(4, 4),
        }
    )
    inject_adapter_in_model(config, network, ADAPTER)
    found = {name: part for name, part in network.named_modules() if isinstance(part, LoraLayer)}
    assert {name: part.r[ADAPTER] for name, part in found.items()} == {name: len(a) for name, (a, _) in layers.items()}
    assert {part.scaling[ADAPTER] for part in found.values()} == {1.0}
