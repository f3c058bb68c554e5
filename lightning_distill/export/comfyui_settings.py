"""Settings in ComfyUI that sample as a student was trained, for model cards."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_distill.errors import alternatives

SHIFT_NODES = {
    "FluxPipeline": "ModelSamplingAuraFlow",
    "Flux2Pipeline": "ModelSamplingAuraFlow",
    "Flux2KleinPipeline": "ModelSamplingAuraFlow",
    "QwenImagePipeline": "ModelSamplingAuraFlow",
    "StableDiffusion3Pipeline": "ModelSamplingSD3",
    "ZImagePipeline": "ModelSamplingAuraFlow",
}
"""Node that sets the shift, by the pipeline class of the families that ComfyUI has and LoRA files exist for.

Both nodes compute `sigma = shift t / (1 + (shift - 1) t)`, as the scheduler of diffusers does. The networks of all families but
Stable Diffusion 3 take sigma itself as their time, so that their node is the one without the factor 1000. `ModelSamplingFlux`
would take the logarithm of the shift.
"""


def comfyui_settings(
    pipeline_class: str, nfe: Sequence[int], scheduler: Mapping[str, Any], arguments: Mapping[str, Any], single_file: bool
) -> dict[str, str]:
    """Settings by their name in ComfyUI; empty for families that it does not have.

    "simple" takes N + 1 evenly spaced times before the shift, which is the grid of the student. The sampler "lcm" predicts x0
    and re-noises it.

    Args:
        pipeline_class: Class of the stock pipeline.
        nfe: Numbers of steps.
        scheduler: "class" and "config" of the scheduler.
        arguments: Arguments of the pipeline besides prompt, steps and size.
        single_file: Whether the export is the transformer, not a LoRA.
    """
    if pipeline_class not in SHIFT_NODES:
        return {}
    config = scheduler["config"]
    settings = {
        "file": "`models/diffusion_models`, node `UNETLoader`"
        if single_file
        else "`models/loras`, node `LoraLoaderModelOnly` with strength 1",
        "steps": alternatives(nfe),
        "cfg": "1",
        "sampler": "lcm" if config.get("stochastic_sampling") else "euler",
        "scheduler": "simple",
    }
    if not config.get("use_dynamic_shifting"):
        settings["shift"] = f"{config.get('shift', 1.0):.4g}, node `{SHIFT_NODES[pipeline_class]}`"
    if pipeline_class in ("FluxPipeline", "Flux2Pipeline") and "guidance_scale" in arguments:
        settings["guidance"] = f"{arguments['guidance_scale']:g}, node `FluxGuidance`"
    return settings
