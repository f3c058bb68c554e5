"""LightningDataModule of Shapes: `setup` renders all images once, and batches are slices of one tensor."""

import math
import random
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_distill.data.resumable import ResumableData
from lightning_distill.data.shapes import CATEGORIES, Prompt, prompts, render, sample_scene
from lightning_distill.errors import ConfigurationError

_CHUNK = 2000  # images per call of `render`; limits the float canvas to 25 MB


class ShapesDataset(Dataset[dict[str, Any]]):
    """Captions, with or without images, loaded one batch at a time.

    Args:
        texts: Caption of each sample.
        images: Images (N, 3, 32, 32), uint8, or None for captions without images.
    """

    def __init__(self, texts: Sequence[str], images: Tensor | None = None) -> None:
        self.texts = list(texts)
        self.images = images

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Load a batch of one sample."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """Load a batch. `DataLoader` calls this once per batch, instead of `__getitem__` once per sample.

        Returns:
            `prompt`, list of B captions; `index` (B,), int64; and `image` (B, 3, 32, 32), float in [-1, 1], if the dataset has
            images.
        """
        index = torch.tensor(indices, dtype=torch.int64)
        batch: dict[str, Any] = {"prompt": [self.texts[i] for i in indices], "index": index}
        if self.images is not None:
            batch["image"] = self.images[index].float().div_(127.5).sub_(1.0)
        return batch


class ShapesData(ResumableData):
    """The Shapes data set for training, validation, test and prediction.

    Training image i depends only on (`seed`, i), and the sample order of an epoch only on (`seed`, epoch). A run resumed
    mid-epoch therefore sees the same samples as an uninterrupted run. Validation and test use new images that do not depend on
    `seed`, so runs with different seeds are evaluated on the same images. Their prompts alternate between the categories, so
    that every batch has all categories.

    Args:
        size: Number of training images.
        batch_size: Samples per batch and process.
        seed: Seed of the training images and of their order.
        category_weights: Relative frequency of each category in training; omitted categories do not occur. None gives all six
            categories the same weight.
        prompts_per_category: Number of validation and test prompts per category.
        held_out: Whether `test` uses the held-out compositions of `position` and `color_attr`, which never occur in training,
            instead of the training prompts.
        num_workers: Worker processes per `DataLoader`. Batches are slices of one tensor, so 0 is usually fastest.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    def __init__(
        self,
        size: int = 20000,
        batch_size: int = 64,
        seed: int = 0,
        category_weights: dict[str, float] | None = None,
        prompts_per_category: int = 40,
        held_out: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        for name, value in (("size", size), ("prompts_per_category", prompts_per_category)):
            if value < 1:
                raise ConfigurationError(f"data.{name} is {value}; set it to 1 or more")
        if batch_size > size:
            raise ConfigurationError(
                f"data.batch_size {batch_size} is larger than data.size {size}; lower batch_size or raise size"
            )
        self.size = size
        self.category_weights = _checked_weights(category_weights)
        self.prompts_per_category = prompts_per_category
        self.held_out = held_out
        self.save_hyperparameters(logger=False)  # the logger's table has the model's settings, and names may clash
        self._train: ShapesDataset | None = None
        self._validation: ShapesDataset | None = None
        self._test: ShapesDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Render the images of a stage; 20,000 images take about three seconds."""
        if stage in ("fit", None) and self._train is None:
            self._train = self._generate_training()
        if stage in ("fit", "validate", "predict", None) and self._validation is None:
            self._validation = _generate_evaluation("validation", self.prompts_per_category, held_out=False)
        if stage in ("test", None) and self._test is None:
            self._test = _generate_evaluation("test", self.prompts_per_category, held_out=self.held_out)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches of `prompt`, `image`, `index` in a fixed order, with held-out compositions if `held_out` is true."""
        return self.evaluation_loader(self.require_setup(self._test))

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches of the validation prompts without images: `prompt` and `index`."""
        return self.evaluation_loader(ShapesDataset(self.require_setup(self._validation).texts))

    def _generate_training(self) -> ShapesDataset:
        pool = prompts(held_out=False)
        weights = [self.category_weights.get(category, 0.0) for category in CATEGORIES]
        texts: list[str] = []
        images = torch.empty(self.size, 3, 32, 32, dtype=torch.uint8)
        for start in range(0, self.size, _CHUNK):
            scenes = []
            for i in range(start, min(start + _CHUNK, self.size)):
                rng = random.Random(f"{self.seed}/{i}")
                prompt = rng.choice(pool[rng.choices(CATEGORIES, weights)[0]])
                texts.append(prompt.text)
                scenes.append(sample_scene(prompt, rng))
            images[start : start + _CHUNK] = render(scenes)
        return ShapesDataset(texts, images)


def evaluation_prompts(per_category: int, *, held_out: bool) -> Iterator[Prompt]:
    """Evaluation prompts that alternate between the categories, the same in every run.

    Each category has a fixed shuffled order. The order repeats if the category has fewer than `per_category` prompts.
    """
    columns = []
    for category, pool in prompts(held_out=held_out).items():
        shuffled = random.Random(category).sample(pool, len(pool))
        columns.append(islice(cycle(shuffled), per_category))
    for row in zip(*columns, strict=True):
        yield from row


def _generate_evaluation(stage: str, per_category: int, *, held_out: bool) -> ShapesDataset:
    chosen = list(evaluation_prompts(per_category, held_out=held_out))
    scenes = [sample_scene(prompt, random.Random(f"{stage}/{i}")) for i, prompt in enumerate(chosen)]
    return ShapesDataset([prompt.text for prompt in chosen], render(scenes))


def _checked_weights(weights: dict[str, float] | None) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(CATEGORIES, 1.0)
    if unknown := [name for name in weights if name not in CATEGORIES]:
        raise ConfigurationError(f"data.category_weights names {unknown[0]!r}; choose from {', '.join(CATEGORIES)}")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights.values()) or not any(weights.values()):
        raise ConfigurationError(f"data.category_weights is {weights}; give weights of 0 or more, at least one above 0")
    return dict(weights)
