import doctest
import pickle
import random

import pytest
import torch
from torch import Tensor

from lightning_distill.data.shapes import CATEGORIES, category_prompts, render, sample_scene
from lightning_distill.metrics import PromptAccuracy, prompt_accuracy


def batch(number: int = 24) -> tuple[Tensor, list[str]]:
    rng = random.Random(0)
    prompts = [rng.choice(category_prompts(CATEGORIES[i % len(CATEGORIES)])) for i in range(number)]
    return render([sample_scene(prompt, rng) for prompt in prompts]) / 255, [prompt.text for prompt in prompts]


def test_accuracy_by_category_and_overall() -> None:
    images, prompts = batch()
    images[0] = 0.5  # the first image of single_object
    images[1] = images[7] = 0.5  # two images of two_object
    accuracy = prompt_accuracy(images, prompts)
    assert list(accuracy) == [*CATEGORIES, "overall"]
    expected = {**dict.fromkeys(CATEGORIES, 1.0), "single_object": 0.75, "two_object": 0.5, "overall": 21 / 24}
    assert {name: value.item() for name, value in accuracy.items()} == pytest.approx(expected)


def test_result_has_only_categories_that_occur() -> None:
    images, prompts = batch(2)
    assert set(prompt_accuracy(images, prompts)) == {"single_object", "two_object", "overall"}


def test_batches_and_processes_accumulate() -> None:
    images, prompts = batch()
    images[::5] = 0.5
    metrics = [PromptAccuracy(), PromptAccuracy()]
    for i in range(0, 24, 4):
        metrics[i // 4 % 2].update(images[i : i + 4], prompts[i : i + 4])
    expected = prompt_accuracy(images, prompts)
    # Emulate synchronization: every state is the sum over processes. The last one has no images.
    merged = PromptAccuracy()
    for name in ("correct", "total"):
        setattr(merged, name, sum(getattr(metric, name) for metric in (*metrics, PromptAccuracy())))
    merged._update_count = 1
    assert merged.compute() == expected


def test_forward_returns_the_batch_value_and_accumulates() -> None:
    images, prompts = batch()
    metric = PromptAccuracy()
    assert metric(images[:6], prompts[:6])["overall"] == 1
    assert metric(torch.zeros(6, 3, 32, 32), prompts[:6])["overall"] == 0
    assert metric.compute()["overall"] == 0.5
    metric.reset()
    assert metric.total.sum() == 0


def test_metric_can_be_pickled() -> None:
    metric = pickle.loads(pickle.dumps(PromptAccuracy()))
    metric.update(*batch())
    assert metric.compute()["overall"] == 1


def test_errors_name_the_remedy() -> None:
    images, prompts = batch(2)
    with pytest.raises(ValueError, match="got 2 images and 1 prompts; give one prompt per image"):
        prompt_accuracy(images, prompts[:1])
    with pytest.raises(ValueError, match="'a purple dog' is not in the Shapes grammar"):
        prompt_accuracy(images, [prompts[0], "a purple dog"])
    with pytest.raises(ValueError, match="the metric has no images; call update"):
        prompt_accuracy(images[:0], [])


def test_docstring_example() -> None:
    found = doctest.DocTestFinder(recurse=False).find(PromptAccuracy, "PromptAccuracy", globs={})
    result = doctest.DocTestRunner().run(found[0])
    assert result.failed == 0
    assert result.attempted > 0
