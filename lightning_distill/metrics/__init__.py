"""Metrics of generated images: prompt accuracy, diversity per prompt, and Frechet distance to the data."""

from lightning_distill.metrics.diversity import PromptDiversity, prompt_diversity
from lightning_distill.metrics.frechet import AutoencoderFeatures, FrechetDistance, frechet_distance
from lightning_distill.metrics.prompt_accuracy import PromptAccuracy, prompt_accuracy
from lightning_distill.metrics.shapes_checker import Reading, Verdict, check, compare, read_scene

__all__ = [
    "AutoencoderFeatures",
    "FrechetDistance",
    "PromptAccuracy",
    "PromptDiversity",
    "Reading",
    "Verdict",
    "check",
    "compare",
    "frechet_distance",
    "prompt_accuracy",
    "prompt_diversity",
    "read_scene",
]
