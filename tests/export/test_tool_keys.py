"""LoRA files of other tools: diffusers reads the same weights back, without unknown keys."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    DiffusionPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.export.lora_layers import LoraLayers, save_lora_file
from lightning_distill.export.single_file import original_tensors, plan_single_file
from lightning_distill.export.tool_keys import TOOL_KEYS, Tool, check_tool_lora, save_tool_lora, tool_keys, tool_lora
from lightning_distill.students.lora_student import lora_modules
from lightning_distill.teachers.families import FAMILIES as PIPELINES
from tests.export.stock_transformers import linear_shapes, merged, random_layers, tiny_stock, without_warnings
from tests.teachers.tiny_families import FAMILIES

TIMES = {
    "FluxTransformer2DModel": "time_text_embed.timestep_embedder.linear_2",
    "Flux2Transformer2DModel": "time_guidance_embed.timestep_embedder.linear_2",
    "QwenImageTransformer2DModel": "time_text_embed.timestep_embedder.linear_2",
    "SD3Transformer2DModel": "time_text_embed.timestep_embedder.linear_2",
    "ZImageTransformer2DModel": "t_embedder.mlp.2",
}
ONE = torch.ones(1, 2)
TOOLS: tuple[Tool, ...] = ("comfyui", "kohya")
READ_IN_FULL = ["flux2", "flux2_klein", "qwen_image", "z_image"]


def flux_dev(**sizes: int) -> nn.Module:
    """FLUX.1's transformer of real width, with two blocks of each kind, without memory for its weights."""
    with init_empty_weights():
        return FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True, **sizes)


def flux_layers(**sizes: int) -> LoraLayers:
    """LoRA of all linear layers; the readers do not use the number of inputs."""
    shapes = linear_shapes(flux_dev(**sizes))
    return random_layers({name: (rows, 4) for name, (rows, _) in shapes.items()})


def layer_names(pipeline: DiffusionPipeline) -> list[str]:
    """Layers with LoRA in a student, and the last layer of the time embedder."""
    targets = PIPELINES[type(pipeline).__name__].network_class.lora_targets
    return [*lora_modules(pipeline.transformer, targets), TIMES[type(pipeline.transformer).__name__]]


def updates(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Updates B A of a state dict in diffusers' format, without those that are zero."""
    found = {}
    for key in state:
        name = key.removesuffix(".lora_A.weight")
        if name != key:
            update = state[f"{name}.lora_B.weight"] @ state[key]
            if update.any():
                found[name.removeprefix("transformer.")] = update
    return found


def assert_same_updates(state: dict[str, Tensor], layers: LoraLayers) -> None:
    found = updates(state)
    assert found.keys() == layers.keys()
    for name, (a, b) in layers.items():
        torch.testing.assert_close(found[name], b @ a)


@pytest.mark.parametrize("tool", TOOLS)
def test_diffusers_reads_a_lora_of_flux_back(tool: Tool) -> None:
    torch.manual_seed(0)
    layers = flux_layers()
    state = tool_lora(layers, "FluxTransformer2DModel", tool)
    with without_warnings():
        assert_same_updates(FluxPipeline.lora_state_dict(dict(state)), layers)


@pytest.mark.parametrize("tool", TOOLS)
def test_factors_of_equal_rank_come_back_unchanged(tool: Tool) -> None:
    """Fused layers are block-diagonal, and the reader takes them apart."""
    layers = {name: (torch.randn(4, 4), torch.randn(len(b), 4)) for name, (_, b) in flux_layers().items()}
    found = FluxPipeline.lora_state_dict(tool_lora(layers, "FluxTransformer2DModel", tool))
    found = {name.removeprefix("transformer."): value for name, value in found.items()}
    for name, (a, b) in layers.items():
        assert torch.equal(found[f"{name}.lora_A.weight"], a)
        assert torch.equal(found[f"{name}.lora_B.weight"], b)


def test_keys_of_flux() -> None:
    layers = {TIMES["FluxTransformer2DModel"]: (torch.ones(4, 8), torch.ones(8, 4))}
    layers |= {f"transformer_blocks.3.attn.to_{each}": (torch.ones(2, 8), torch.ones(8, 2)) for each in "qv"}
    stems = {
        "comfyui": ["diffusion_model.time_in.out_layer", "diffusion_model.double_blocks.3.img_attn.qkv"],
        "kohya": ["lora_unet_time_in_out_layer", "lora_unet_double_blocks_3_img_attn_qkv"],
    }
    for tool in TOOLS:
        state = tool_lora(layers, "FluxTransformer2DModel", tool)
        names = ("lora_down.weight", "lora_up.weight", "alpha")
        assert state.keys() == {f"{stem}.{name}" for stem in stems[tool] for name in names}
        assert [state[f"{stem}.alpha"].item() for stem in stems[tool]] == [4, 4]
        up = state[f"{stems[tool][1]}.lora_up.weight"]
        assert up.shape == (24, 4)
        assert [up[:8, :2].sum(), up[16:, 2:].sum(), up.sum()] == [16, 16, 32]


def test_diffusers_drops_the_time_embedder_of_flux() -> None:
    """Its loader takes names with this prefix only; the note becomes obsolete when this test fails."""
    for tool in TOOLS:
        state = FluxPipeline.lora_state_dict(tool_lora(flux_layers(), "FluxTransformer2DModel", tool))
        dropped = {name.split(".lora_")[0] for name in state if not name.startswith("transformer.")}
        assert TIMES["FluxTransformer2DModel"] in dropped
        assert "time embedder" in tool_keys("FluxTransformer2DModel", tool).note


def original_weights(weights: dict[str, Tensor], transformer: nn.Module) -> dict[str, Tensor]:
    """Weights in the original layout."""
    plan = plan_single_file(weights, type(transformer).__name__, transformer.config)
    return dict(original_tensors(plan, weights, lambda names: {name: weights[name] for name in names}))


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("kind", [FluxTransformer2DModel, Flux2Transformer2DModel, QwenImageTransformer2DModel])
def test_updates_of_the_original_weights_are_the_merged_weights(kind: type[nn.Module], tool: Tool) -> None:
    """ComfyUI adds B A to `X.weight` of the original layout for the keys `diffusion_model.X` and `lora_unet_X`."""
    torch.manual_seed(0)
    with init_empty_weights():
        transformer = kind(num_layers=2, **({} if kind is QwenImageTransformer2DModel else {"num_single_layers": 2}))
    # Four inputs are enough: no layout depends on their number.
    weights = {name: torch.randn(len(value), *(4 for _ in value.shape[1:])) for name, value in transformer.state_dict().items()}
    keys = tool_keys(kind.__name__, tool)
    layers = random_layers({name: (rows, 4) for name, (rows, _) in linear_shapes(transformer).items()})
    layers = {name: layers[name] for name, place in keys.layout.layers(layers).items() if place.name not in keys.unread}
    state = tool_lora(layers, kind.__name__, tool)
    found = original_weights(weights, transformer)
    stems = {f"diffusion_model.{name}": name for name in found}
    stems |= {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}.weight": name for name in found}
    used = set()
    for name in state:
        stem, factor, suffix = name.rpartition(f".{keys.factors.a}")
        if factor:
            a, b = state[name], state[f"{stem}.{keys.factors.b}{suffix}"]
            original = stems[f"{stem}{suffix}"]
            found[original] = found[original] + b @ a
            used.add(stem)
    assert {name.rpartition(".lora_")[0] or name.removesuffix(".alpha") for name in state} == used
    merged_weights = {
        name: value + layers[layer][1] @ layers[layer][0] if (layer := name.removesuffix(".weight")) in layers else value
        for name, value in weights.items()
    }
    expected = original_weights(merged_weights, transformer)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


LOADED = [(family, tool) for family in ["flux", "flux_guided", *READ_IN_FULL] for tool in TOOLS]


@pytest.mark.parametrize(("family", "tool"), [*LOADED, ("stable_diffusion_3", "comfyui")])
def test_loaded_file_equals_merged_weights(family: str, tool: Tool, tmp_path: Path) -> None:
    pipeline, evaluate = tiny_stock(family)
    transformer = pipeline.transformer
    names = layer_names(pipeline)
    if family.startswith("flux") and family not in READ_IN_FULL:
        # The reader has the width of FLUX.1 built in for one fused layer, and drops the time embedder.
        fused = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        names = [name for name in names if "blocks" in name and not (name.startswith("single") and name.endswith(fused))]
        assert len(names) > 8
    layers = random_layers(linear_shapes(transformer, names))
    expected = evaluate(merged(transformer, layers))
    file = tmp_path / "lora.safetensors"
    save_tool_lora(layers, type(transformer).__name__, tool, file)
    with without_warnings():
        assert_same_updates(pipeline.lora_state_dict(str(file)), layers)
        pipeline.load_lora_weights(str(file))
    torch.testing.assert_close(evaluate(transformer), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("family", READ_IN_FULL)
def test_all_linear_layers_are_read_or_refused(family: str, tool: Tool) -> None:
    """An extracted LoRA has updates of all linear layers."""
    pipeline, _ = tiny_stock(family)
    kind = type(pipeline.transformer).__name__
    layers = random_layers(linear_shapes(pipeline.transformer))
    keys = tool_keys(kind, tool)
    refused = [name for name, place in keys.layout.layers(layers).items() if place.name in keys.unread]
    assert bool(refused) == (kind == "Flux2Transformer2DModel" and tool == "kohya")
    for name in refused:
        with pytest.raises(ConfigurationError, match=f"format {tool} is not possible for {kind}: .* the layer {name}; "):
            tool_lora({name: layers.pop(name)}, kind, tool)
    if kind == "Flux2Transformer2DModel":
        layers.pop("norm_out.linear", None)  # the reader takes shift for scale
    with without_warnings():
        assert_same_updates(pipeline.lora_state_dict(tool_lora(layers, kind, tool)), layers)


def test_comfyui_takes_the_diffusers_names_of_sd3(tmp_path: Path) -> None:
    layers = {"transformer_blocks.0.attn.to_q": (torch.ones(1, 2), torch.ones(2, 1))}
    written = load_file(save_lora_file(layers, tmp_path))
    assert tool_lora(layers, "SD3Transformer2DModel", "comfyui").keys() == written.keys()


def test_formats_without_a_reader_raise() -> None:
    kinds = {type(build().transformer).__name__ for build in FAMILIES.values()}
    pairs = [(kind, tool) for kind in sorted(kinds) for tool in TOOLS]
    refused = [(kind, tool) for kind, tool in pairs if tool not in TOOL_KEYS.get(kind, {})]
    assert refused == [
        ("HunyuanImageTransformer2DModel", "comfyui"),
        ("HunyuanImageTransformer2DModel", "kohya"),
        ("SD3Transformer2DModel", "kohya"),
        ("SanaTransformer2DModel", "comfyui"),
        ("SanaTransformer2DModel", "kohya"),
    ]
    for kind, tool in refused:
        with pytest.raises(ConfigurationError, match=f"format {tool} is not possible for {kind}: diffusers has no reader"):
            tool_keys(kind, tool)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            flux_layers(num_attention_heads=2),
            r"single_blocks\.0\.linear1 fuses layers of 3072 outputs each, .* and these have 256, 256, 256, 1024; export",
        ),
        (
            {
                "transformer_blocks.0.attn.to_q": (ONE, torch.ones(2, 1)),
                "transformer_blocks.0.attn.to_k": (ONE, torch.ones(3, 1)),
            },
            r"double_blocks\.0\.img_attn\.qkv fuses layers of equal outputs each, .* and these have 2, 3; export",
        ),
        ({"pos_embed": (ONE, torch.ones(2, 1))}, "there is no key for the layer pos_embed; export"),
    ],
)
def test_layers_that_readers_would_not_understand_raise(layers: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tool_lora(layers, "FluxTransformer2DModel", "comfyui")
    outputs = {name: len(b) for name, (_, b) in layers.items()}
    with pytest.raises(ConfigurationError, match=message):
        check_tool_lora(outputs, "FluxTransformer2DModel", "kohya")


@pytest.mark.parametrize("tool", TOOLS)
def test_layers_of_flux_dev_pass_the_check(tool: Tool) -> None:
    shapes = linear_shapes(flux_dev())
    check_tool_lora({name: rows for name, (rows, _) in shapes.items()}, "FluxTransformer2DModel", tool)
