"""Diversity of the images of one prompt."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def prompt_diversity(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Root mean squared pixel distance between two images of one prompt, averaged over prompts; see `PromptDiversity`.

    Args:
        images: Images (B, C, H, W) in [0, 1].
        prompts: B captions. Only prompts that occur at least twice count.

    Raises:
        ValueError: If the numbers of images and prompts differ, or no prompt occurs twice.
    """
    return _compute(*_update(images, prompts))


class PromptDiversity(Metric):
    r"""Diversity of the images of one prompt, for comparison with the diversity of the data.

    A student that averages modes or collapses has a lower diversity than the data.

    .. math:: d = \frac{1}{|C|} \sum_{c \in C} \sqrt{\frac{2}{n_c (n_c - 1)} \sum_{i < j} \frac{|x_i - x_j|^2}{D}},

    where C are the prompts with at least two images and D = C H W. The mean squared distance of pairs is twice the unbiased
    variance. The metric therefore uses each image once and forms no pairs. The state has a row for each prompt of a batch: key,
    number of images, mean and squared deviation. Rows with the same key merge across batches and processes by the parallel
    formula of Chan et al. (1979), which avoids cancellation.

    `update` takes images (B, C, H, W) in [0, 1] and B captions. `compute` returns a scalar in [0, 1].

    Args:
        kwargs: Settings of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_distill.metrics import PromptDiversity
        >>> metric = PromptDiversity()
        >>> metric.update(torch.zeros(2, 3, 32, 32), ["a circle", "a cross"])
        >>> metric.update(torch.full((2, 3, 32, 32), 0.5), ["a circle", "a square"])
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    key: list[Tensor]
    count: list[Tensor]
    mean: list[Tensor]
    deviation: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # States are one-dimensional with one dtype, so that a process without images can still gather an empty tensor.
        for name in ("key", "count", "mean", "deviation"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Add images (B, C, H, W) in [0, 1] with their B prompts."""
        for state, rows in zip((self.key, self.count, self.mean, self.deviation), _update(images, prompts), strict=True):
            state.append(rows)

    def compute(self) -> Tensor:
        """Diversity of all images since the last reset."""
        states = (self.key, self.count, self.mean, self.deviation)
        if not len(self.key):
            raise ValueError("the metric has no images; call update before compute")
        key, count, mean, deviation = (dim_zero_cat(state) for state in states)
        return _compute(key, count, mean, deviation)


def _update(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flattened state rows, one per prompt: two key parts, count, mean (D values) and squared deviation."""
    if len(images) != len(prompts):
        raise ValueError(f"got {len(images)} images and {len(prompts)} prompts; give one prompt per image")
    pixels = images.detach().float().flatten(1)
    unique_prompts = sorted(set(prompts))
    row = torch.tensor([unique_prompts.index(prompt) for prompt in prompts], dtype=torch.long, device=pixels.device)
    count = pixels.new_zeros(len(unique_prompts)).index_add_(0, row, pixels.new_ones(len(pixels)))
    mean = pixels.new_zeros(len(unique_prompts), pixels.shape[1]).index_add_(0, row, pixels) / count[:, None]
    squared = (pixels - mean[row]).square().sum(1)
    deviation = torch.zeros_like(count).index_add_(0, row, squared)
    key = torch.tensor([_key(prompt) for prompt in unique_prompts], dtype=torch.float32, device=pixels.device)
    return key.flatten(), count, mean.flatten(), deviation


def _key(prompt: str) -> tuple[float, float]:
    """Key of a prompt: two integers below 2^24, exact in float32 and, unlike `hash`, equal in all processes."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=6).digest()
    return float(int.from_bytes(digest[:3], "big")), float(int.from_bytes(digest[3:], "big"))


def _compute(key: Tensor, count: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    rows, row = key.view(-1, 2).unique(dim=0, return_inverse=True)
    count, mean, deviation = count.double(), mean.view(len(count), -1).double(), deviation.double()
    total = count.new_zeros(len(rows)).index_add_(0, row, count)
    center = mean.new_zeros(len(rows), mean.shape[1]).index_add_(0, row, mean * count[:, None]) / total[:, None]
    between = count * (mean - center[row]).square().sum(1)
    squared = torch.zeros_like(total).index_add_(0, row, deviation + between)
    repeated = total > 1
    if not repeated.any():
        raise ValueError("no prompt has two images; diversity needs at least two images of a prompt")
    variance = squared[repeated] / (total[repeated] - 1) / mean.shape[1]
    return (2 * variance).sqrt().mean().float()
