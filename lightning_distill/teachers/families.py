"""Families of diffusers pipelines with a two-time student."""

import inspect
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from lightning_distill.students.few_step import FewStepPipeline
from lightning_distill.students.two_time import TwoTimeModel
from lightning_distill.students.two_time_flux import TwoTimeFluxPipeline
from lightning_distill.students.two_time_flux2 import TwoTimeFlux2KleinPipeline, TwoTimeFlux2Pipeline
from lightning_distill.students.two_time_hunyuan_image import TwoTimeHunyuanImagePipeline
from lightning_distill.students.two_time_qwen_image import TwoTimeQwenImagePipeline
from lightning_distill.students.two_time_sana import TwoTimeSanaPipeline
from lightning_distill.students.two_time_sd3 import TwoTimeStableDiffusion3Pipeline
from lightning_distill.students.two_time_z_image import TwoTimeZImagePipeline

FAMILIES: dict[str, type[FewStepPipeline]] = {
    family.stock_class.__name__: family
    for family in (
        TwoTimeFlux2KleinPipeline,
        TwoTimeFlux2Pipeline,
        TwoTimeFluxPipeline,
        TwoTimeHunyuanImagePipeline,
        TwoTimeQwenImagePipeline,
        TwoTimeSanaPipeline,
        TwoTimeStableDiffusion3Pipeline,
        TwoTimeZImagePipeline,
    )
}
"""Few-step pipeline classes by the name of the stock pipeline class."""


def two_time(network: nn.Module) -> TwoTimeModel:
    """Narrow the type of a network.

    Raises:
        TypeError: If it is not a two-time transformer.
    """
    if not isinstance(network, TwoTimeModel):
        raise TypeError(f"DiffusersAdapter needs a two-time transformer, not a {type(network).__name__}")
    return network


def without_weights(family: type[FewStepPipeline], vae: nn.Module) -> FewStepPipeline:
    """A pipeline with an autoencoder, which may be on the meta device, and no other component: it knows the sizes of images."""
    parameters = inspect.signature(family.__init__).parameters.values()
    required = [each.name for each in parameters if each.default is each.empty and each.name != "self"]
    return family(**{**dict.fromkeys(required), "vae": vae})


def stock_options(kind: type[DiffusionPipeline], max_sequence_length: int) -> dict[str, Any]:
    """Arguments that make a stock pipeline pad prompts as in training, and sample in the requested image size."""
    options = {"max_sequence_length": max_sequence_length, "use_resolution_binning": False}
    known = inspect.signature(kind.__call__).parameters
    return {name: value for name, value in options.items() if name in known}
