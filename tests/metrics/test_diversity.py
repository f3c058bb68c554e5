import doctest
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lightning_distill.metrics import PromptDiversity, prompt_diversity
from lightning_distill.metrics.diversity import _key


def batch() -> tuple[Tensor, list[str]]:
    return torch.rand(10, 3, 4, 4), ["a", "b", "a", "c", "a", "b", "d", "b", "a", "d"]


def by_pairs(images: Tensor, prompts: list[str]) -> float:
    """Reference implementation: the definition over all pairs."""
    distances = []
    for prompt in sorted(set(prompts)):
        group = [image for image, name in zip(images.double(), prompts, strict=True) if name == prompt]
        squared = [(a - b).square().mean().item() for a, b in itertools.combinations(group, 2)]
        if squared:
            distances.append((sum(squared) / len(squared)) ** 0.5)
    return sum(distances) / len(distances)


def test_equals_the_definition_by_pairs() -> None:
    images, prompts = batch()
    assert prompt_diversity(images, prompts).item() == pytest.approx(by_pairs(images, prompts), rel=1e-6)


def test_batch_split_does_not_matter() -> None:
    images, prompts = batch()
    metric = PromptDiversity()
    for part in ([0], [1, 2, 3], [4, 5, 6, 7, 8, 9]):
        metric.update(images[part], [prompts[i] for i in part])
    assert metric.compute().item() == pytest.approx(by_pairs(images, prompts), rel=1e-6)


def test_identical_images_have_zero_diversity() -> None:
    metric = PromptDiversity()
    for _ in range(3):
        metric.update(torch.full((2, 3, 32, 32), 0.7), ["a circle", "a circle"])
    assert metric.compute() == pytest.approx(0, abs=1e-6)


def test_forward_accumulates() -> None:
    images, prompts = batch()
    metric = PromptDiversity()
    assert metric(images[:5], prompts[:5]).item() == pytest.approx(by_pairs(images[:5], prompts[:5]), rel=1e-6)
    metric.update(images[5:], prompts[5:])
    assert metric.compute().item() == pytest.approx(by_pairs(images, prompts), rel=1e-6)


def _process(rank: int, store: str, images: Tensor, prompts: list[str], expected: float) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    metric = PromptDiversity()
    if rank < 2:  # rank 2 has no images
        part = range(rank, len(prompts), 2)
        metric.update(images[list(part)], [prompts[i] for i in part])
    metric._update_count = 1
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6)
    dist.destroy_process_group()


@pytest.mark.slow
def test_states_merge_across_processes(tmp_path: Path) -> None:
    images, prompts = batch()
    mp.spawn(_process, (str(tmp_path / "store"), images, prompts, by_pairs(images, prompts)), nprocs=3)


def test_keys_are_equal_in_all_processes() -> None:
    assert _key("a red circle") == (6715157.0, 3030588.0)
    high, low = _key("a red circle")
    assert max(high, low) < 2**24
    assert _key("a red circle") != _key("a circle red")


def test_errors_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="got 2 images and 1 prompts; give one prompt per image"):
        prompt_diversity(torch.rand(2, 3, 4, 4), ["a"])
    with pytest.raises(ValueError, match="diversity needs at least two images of a prompt"):
        prompt_diversity(torch.rand(2, 3, 4, 4), ["a", "b"])


def test_docstring_example() -> None:
    found = doctest.DocTestFinder(recurse=False).find(PromptDiversity, "PromptDiversity", globs={})
    result = doctest.DocTestRunner().run(found[0])
    assert result.failed == 0
    assert result.attempted > 0
