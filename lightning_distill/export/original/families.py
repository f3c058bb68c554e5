"""Original layouts by the class of the transformer."""

from lightning_distill.export.original.flux import FLUX, FLUX_2
from lightning_distill.export.original.layout import Layout
from lightning_distill.export.original.sana import SANA
from lightning_distill.export.original.stable_diffusion_3 import STABLE_DIFFUSION_3
from lightning_distill.export.original.z_image import Z_IMAGE

LAYOUTS: dict[str, Layout] = {
    "Flux2Transformer2DModel": FLUX_2,
    "FluxTransformer2DModel": FLUX,
    "QwenImageTransformer2DModel": Layout(keeps_others=True),  # the authors' names are those of diffusers
    "SD3Transformer2DModel": STABLE_DIFFUSION_3,
    "SanaTransformer2DModel": SANA,
    "ZImageTransformer2DModel": Z_IMAGE,
}
"""Layouts by the name of diffusers' class, as in the transformer's `config.json`."""
