"""How much the pictures of one prompt differ from each other."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def prompt_diversity(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Root mean squared pixel distance of two pictures of one prompt, averaged over prompts; see `PromptDiversity`.

    Args:
        images: (B, C, H, W) in [0, 1].
        prompts: B captions. Only those that occur twice or more count.

    Raises:
        ValueError: If the numbers of pictures and prompts differ, or no prompt occurs twice.
    """
    return _compute(*_update(images, prompts))


class PromptDiversity(Metric):
    r"""Diversity of the pictures of one prompt, to hold against the data's: a student that averages or collapses falls short.

    .. math:: d = \frac{1}{|C|} \sum_{c \in C} \sqrt{\frac{2}{n_c (n_c - 1)} \sum_{i < j} \frac{|x_i - x_j|^2}{D}},

    where C are the prompts with at least two pictures and D = C H W. The mean squared distance of pairs is twice the
    unbiased variance, so a picture is seen once and no pair is formed. A state is a row for each prompt of a batch: a key, the
    number of pictures, their mean and their squared deviation. Rows of one key, of whatever batch or process, merge by the
    parallel formula of Chan et al. (1979), which does not cancel digits.

    As input to `update`: images (B, C, H, W) in [0, 1] and B captions. `compute` returns a scalar in [0, 1].

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
        # One-dimensional and of one dtype: a process without a picture then contributes an empty tensor that still gathers.
        for name in ("key", "count", "mean", "deviation"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Take pictures (B, C, H, W) in [0, 1] of the prompts."""
        for state, rows in zip((self.key, self.count, self.mean, self.deviation), _update(images, prompts), strict=True):
            state.append(rows)

    def compute(self) -> Tensor:
        """Diversity over everything seen."""
        states = (self.key, self.count, self.mean, self.deviation)
        if not len(self.key):
            raise ValueError("no picture was given; update the metric before computing it")
        key, count, mean, deviation = (dim_zero_cat(state) for state in states)
        return _compute(key, count, mean, deviation)


def _update(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of the state, flattened: two key parts, count, mean (D numbers) and squared deviation for each prompt."""
    if len(images) != len(prompts):
        raise ValueError(f"got {len(images)} images and {len(prompts)} prompts; give one prompt an image")
    pictures = images.detach().float().flatten(1)
    names = sorted(set(prompts))
    row = torch.tensor([names.index(prompt) for prompt in prompts], dtype=torch.long, device=pictures.device)
    count = pictures.new_zeros(len(names)).index_add_(0, row, pictures.new_ones(len(pictures)))
    mean = pictures.new_zeros(len(names), pictures.shape[1]).index_add_(0, row, pictures) / count[:, None]
    squared = (pictures - mean[row]).square().sum(1)
    deviation = torch.zeros_like(count).index_add_(0, row, squared)
    key = torch.tensor([_key(name) for name in names], dtype=torch.float32, device=pictures.device)
    return key.flatten(), count, mean.flatten(), deviation


def _key(prompt: str) -> tuple[float, float]:
    """The same two numbers for a prompt in every process (`hash` is not), each below 2^24 and so exact in float32."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=6).digest()
    return float(int.from_bytes(digest[:3], "big")), float(int.from_bytes(digest[3:], "big"))


def _compute(key: Tensor, count: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    rows, row = key.view(-1, 2).unique(dim=0, return_inverse=True)
    count, mean, deviation = count.double(), mean.view(len(count), -1).double(), deviation.double()
    total = count.new_zeros(len(rows)).index_add_(0, row, count)
    centre = mean.new_zeros(len(rows), mean.shape[1]).index_add_(0, row, mean * count[:, None]) / total[:, None]
    between = count * (mean - centre[row]).square().sum(1)
    squared = torch.zeros_like(total).index_add_(0, row, deviation + between)
    repeated = total > 1
    if not repeated.any():
        raise ValueError("no prompt has two pictures; diversity needs at least two pictures of a prompt")
    variance = squared[repeated] / (total[repeated] - 1) / mean.shape[1]
    return (2 * variance).sqrt().mean().float()
