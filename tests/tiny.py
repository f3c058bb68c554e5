"""Tiny FLUX pipelines for tests: random weights, the architecture of FLUX.1."""

import itertools
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from lightning_distill.flow.path import flow_step, interpolate
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.embedded import build_flux_pipeline
from lightning_distill.teachers.model_adapter import ModelAdapter

WORDS = ["a", "red", "green", "circle", "square"]
PROMPTS = ["a red circle", "a green square", "a circle"]
FLUX_DEV_SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
"""Settings from the scheduler_config.json of FLUX.1-dev."""


def tiny_vae() -> AutoencoderKL:
    """An autoencoder from images of 32 x 32 pixels to latents (16, 8, 8)."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.5,
        shift_factor=0.1,
    )


def tiny_pipeline(
    guidance_embeds: bool = False, scheduler: dict[str, Any] | None = None, num_attention_heads: int = 2
) -> FluxPipeline:
    """A FLUX pipeline with random weights from torch's global generator."""
    pipeline = build_flux_pipeline(
        tiny_vae(), WORDS, num_layers=1, num_single_layers=1, num_attention_heads=num_attention_heads, text_width=16
    )
    if guidance_embeds:
        config = {name: value for name, value in pipeline.transformer.config.items() if not name.startswith("_")}
        pipeline.transformer = FluxTransformer2DModel(**{**config, "guidance_embeds": True})
    if scheduler:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny_pipeline(directory: Path, **options: Any) -> str:
    """Write a `tiny_pipeline` and return its directory."""
    tiny_pipeline(**options).save_pretrained(directory)
    return str(directory)


def load_adapter(directory: str, **options: Any) -> DiffusersAdapter:
    """A loaded adapter of a directory."""
    adapter = DiffusersAdapter(directory, **options)
    adapter.check()
    adapter.load()
    return adapter


def noise(count: int, first_seed: int = 0, shape: tuple[int, ...] = (16, 8, 8)) -> Tensor:
    """Noise (count, C, h, w) with one seed per sample."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(first_seed + i)) for i in range(count)])


@torch.no_grad()
def sample_images(
    adapter: ModelAdapter, student: torch.nn.Module, prompts: list[str], nfe: int, guidance_scale: float | None = None
) -> Tensor:
    """Sample images in [0, 1] with the adapter's average velocities and `flow_step`; re-noise if `stochastic_sampling`."""
    shape = adapter.latent_shape(32, 32)
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]

    def fresh_noise() -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    condition, x = adapter.encode_prompt(prompts), fresh_noise()
    grid = adapter.time_grid(nfe, shape)
    for t, r in itertools.pairwise(grid):
        start, end = t.expand(len(x)), (0 * r if adapter.stochastic_sampling else r).expand(len(x))
        x = flow_step(x, adapter.average_velocity(student, x, end, start, condition, guidance_scale), end, start)
        if adapter.stochastic_sampling and r > 0:
            x = interpolate(x, fresh_noise(), r.expand(len(x)))
    return (adapter.decode_latents(x) / 2 + 0.5).clamp(0, 1)


def perturb_weights(network: torch.nn.Module) -> torch.nn.Module:
    """Add noise to every weight, including the zeros of the interval embedder, so that the output depends on r."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network
