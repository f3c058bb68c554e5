"""Low-rank updates of stored weights: values, precision, and rows."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_distill.sharding.low_rank_update import CHUNK, LowRankUpdate
from lightning_distill.sharding.stored_weights import StoredWeights

ROWS = 2 * CHUNK + 3


def update(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, rank: int = 3) -> LowRankUpdate:
    return LowRankUpdate(torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank), dtype)


@pytest.mark.parametrize("shape", [(ROWS, 5), (4, 6, 2, 2)])
def test_update_is_the_product_of_its_factors(shape: tuple[int, ...]) -> None:
    weight, added = torch.randn(shape), update(shape)
    expected = weight + (added.up @ added.down.flatten(1)).reshape(shape)
    torch.testing.assert_close(added.added_to(weight), expected, atol=1e-5, rtol=0)


def test_sum_is_rounded_once() -> None:
    weight, added = torch.randn(64, 8).bfloat16(), update((64, 8), torch.bfloat16)
    expected = (weight.float() + (added.up.double() @ added.down.double()).float()).bfloat16()
    assert torch.equal(added.added_to(weight), expected)


def test_rows_equal_those_of_the_whole_weight() -> None:
    weight, added = torch.randn(ROWS, 300), update((ROWS, 300), rank=64)
    whole = added.added_to(weight)
    for start, stop in ((0, 7), (CHUNK - 1, ROWS), (ROWS - 1, ROWS)):
        assert torch.equal(added.added_to(weight[start:stop], start), whole[start:stop])


def test_stored_weights_add_updates_to_what_is_read(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(10, 4), "a.bias": torch.randn(10)}
    save_file(state, tmp_path / "model.safetensors")
    added = update((10, 4))
    weights = StoredWeights.of_component(tmp_path).updated({"a.weight": added})
    expected = added.added_to(state["a.weight"])
    assert torch.equal(weights.read("a.weight"), expected)
    assert torch.equal(weights.read("a.weight", 3, 8), expected[3:8])
    assert torch.equal(weights.read("a.bias"), state["a.bias"])
    assert torch.equal(weights.renamed({"b.weight": "a.weight"}).read("b.weight"), expected)
    with pytest.raises(KeyError, match=r"b\.weight"):
        weights.updated({"b.weight": added})
