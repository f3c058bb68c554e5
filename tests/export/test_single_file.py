"""Transformers in their original layout: `from_single_file` reads the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors import safe_open
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.export.single_file import original_tensors, plan_single_file, save_single_file
from tests.export.stock_transformers import without_warnings
from tests.teachers.tiny_families import FAMILIES


def transformer_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    transformer: nn.Module = FAMILIES[family]().transformer
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_()
    return transformer


def save(transformer: Any, file: Path) -> None:
    """Write from weights that are read on demand, and flat."""
    state = transformer.state_dict()
    meta = {name: value.to("meta") for name, value in state.items()}
    save_single_file(
        meta,
        lambda names: {name: state[name].flatten() for name in names},
        type(transformer).__name__,
        transformer.config,
        file,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["flux2", "flux2_klein", "qwen_image", "sana", "stable_diffusion_3", "z_image"])
def test_the_file_is_read_back_bit_by_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    transformer: Any = transformer_of(family).to(dtype)
    transformer.save_config(tmp_path / "transformer")
    file = tmp_path / "single.safetensors"
    save(transformer, file)
    with without_warnings():
        found = type(transformer).from_single_file(
            str(file), config=str(tmp_path), subfolder="transformer", local_files_only=True, dtype=dtype
        )
    expected = transformer.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    with safe_open(file, framework="pt") as tensors:
        names = set(tensors.keys())
    if family != "qwen_image":
        assert names != expected.keys()


def flux_dev(**options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of FLUX.1 with its real numbers of outputs, but single inputs, and two blocks of each kind."""
    with init_empty_weights():
        transformer = FluxTransformer2DModel(num_layers=2, num_single_layers=2, **options)
    shapes = {name: value.shape for name, value in transformer.state_dict().items()}
    torch.manual_seed(0)
    return {name: torch.randn(shape[0], *(1 for _ in shape[1:])) for name, shape in shapes.items()}, transformer.config


@pytest.mark.parametrize("guidance", [False, True], ids=["flux", "flux_guided"])
def test_flux_is_read_back_bit_by_bit(guidance: bool) -> None:
    """The reader has the width of FLUX.1 built in, so this calls it without a network."""
    weights, config = flux_dev(guidance_embeds=guidance)
    plan = plan_single_file(weights, "FluxTransformer2DModel", config)
    written = dict(original_tensors(plan, weights, lambda names: {name: weights[name] for name in names}))
    assert "double_blocks.1.img_attn.norm.query_norm.scale" in written
    found = convert_flux_transformer_checkpoint_to_diffusers(written)
    assert found.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in found.items())


def test_networks_that_diffusers_cannot_read_back_raise(tmp_path: Path) -> None:
    refusal = "format single_file is not possible for"
    for family, reason in {
        "flux": r"FluxTransformer2DModel: the reader of diffusers does not fit these sizes \(.*\); export the format stock",
        "hunyuan_image": "HunyuanImageTransformer2DModel: diffusers cannot read a single file of this class; export",
    }.items():
        with pytest.raises(ConfigurationError, match=f"{refusal} {reason}"):
            save(transformer_of(family), tmp_path / "single.safetensors")
    weights, config = flux_dev()
    with pytest.raises(ConfigurationError, match=r"its original layout has no 'interval\.weight'; export the format stock"):
        plan_single_file({**weights, "interval.weight": torch.ones(1)}, "FluxTransformer2DModel", config)
    sana: Any = transformer_of("sana")
    norms = {"transformer_blocks.0.attn1.to_q.bias": torch.ones(16)}
    with pytest.raises(ConfigurationError, match=r"the reader of diffusers does not give back .*attn1\.to_q\.bias'; export"):
        plan_single_file({**sana.state_dict(), **norms}, "SanaTransformer2DModel", sana.config)
    assert not list(tmp_path.iterdir())
