"""Cached latents, when other processes still encode."""

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from lightning_distill.methods.encoder import BatchEncoder


def test_all_processes_encode_if_one_has_to() -> None:
    """DeepSpeed compares the calls of modules in all processes."""
    calls: list[Tensor] = []
    flags: list[bool] = []
    others = iter([False, False, True, False])

    def encode(images: Tensor) -> Tensor:
        calls.append(images)
        return 2 * images

    def any_process(flag: bool, device: torch.device) -> bool:
        flags.append(flag)
        return flag or next(others)

    adapter = cast(Any, SimpleNamespace(encode_images=encode))
    encoder = BatchEncoder(adapter, lambda: torch.device("cpu"), cache_latents=True, any_process=any_process)
    batch: Any = {"image": torch.ones(2, 3, 4, 4), "index": torch.tensor([5, 7])}
    expected = [1, 1, 1, 2, 2]  # the fourth time another process has a new image
    for count in expected:
        assert torch.equal(encoder.latents(batch, training=True), 2 * batch["image"])
        assert len(calls) == count
    assert flags == [True, False, False, False, False]
    encoder.latents(batch)  # of validation: no cache, and equal batches in all processes
    assert len(flags) == 5
