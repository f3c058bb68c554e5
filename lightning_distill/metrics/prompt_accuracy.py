"""Share of images that match their prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_distill.data.shapes import CATEGORIES, parse_prompt
from lightning_distill.metrics.shapes_checker import check


def prompt_accuracy(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Share of Shapes images that match their prompts, by category and overall.

    Args:
        images: Images (B, 3, 32, 32) in [0, 1].
        prompts: B captions of the Shapes grammar.

    Returns:
        A scalar in [0, 1] for each of `CATEGORIES` that occurs, and "overall", the mean over images.

    Raises:
        ValueError: If a prompt is not in the grammar, the numbers of images and prompts differ, or there are no images.
    """
    return _compute(*_update(images, prompts))


class PromptAccuracy(Metric):
    r"""Share of Shapes images that match their prompts, by category and overall, as in GenEval (arXiv 2310.11513).

    .. math:: a_k = \frac{1}{|k|} \sum_{i \in k} [x_i \text{ matches } c_i]

    for every category k. Overall is the mean over images, so frequent categories have more weight. Use equally many prompts per
    category for equal weights. An image is correct if `shapes_checker.check` finds no flaw and no mismatch with the prompt.

    `update` takes images (B, 3, 32, 32) in [0, 1] and B captions. `compute` returns a scalar in [0, 1] for each of `CATEGORIES`
    that occurs, and "overall".

    Args:
        kwargs: Settings of `torchmetrics.Metric`.

    Example:
        >>> import random
        >>> from lightning_distill.data.shapes import parse_prompt, render, sample_scene
        >>> from lightning_distill.metrics import PromptAccuracy
        >>> captions = ["a red circle", "two crosses"]
        >>> scenes = [sample_scene(parse_prompt(caption), random.Random(0)) for caption in captions]
        >>> metric = PromptAccuracy()
        >>> metric.update(render(scenes) / 255, captions)
        >>> metric.update(render(scenes[:1]) / 255, ["a blue circle"])
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'counting': 1.0, 'colors': 0.5, 'overall': 0.667}
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    correct: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", torch.zeros(len(CATEGORIES), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(len(CATEGORIES), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Check images (B, 3, 32, 32) in [0, 1] against their prompts."""
        correct, total = _update(images, prompts)
        self.correct += correct.to(self.correct.device)
        self.total += total.to(self.total.device)

    def compute(self) -> dict[str, Tensor]:
        """Accuracy of every category that occurs, and "overall"."""
        return _compute(self.correct, self.total)


def _update(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Numbers of correct images and of all images by category, both (len(CATEGORIES),)."""
    if len(images) != len(prompts):
        raise ValueError(f"got {len(images)} images and {len(prompts)} prompts; give one prompt per image")
    correct, total = torch.zeros(2, len(CATEGORIES), dtype=torch.long)
    for image, text in zip(images.detach().cpu(), prompts, strict=True):
        prompt = parse_prompt(text)
        category = CATEGORIES.index(prompt.category)
        total[category] += 1
        correct[category] += check(image, prompt).ok
    return correct, total


def _compute(correct: Tensor, total: Tensor) -> dict[str, Tensor]:
    if not total.any():
        raise ValueError("the metric has no images; call update before compute")
    accuracy = {name: correct[i] / total[i] for i, name in enumerate(CATEGORIES) if total[i]}
    return {**accuracy, "overall": correct.sum() / total.sum()}
