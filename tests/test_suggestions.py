import pytest

from lightning_distill.suggestions import LISTED, nearest, suggestion


@pytest.mark.parametrize(
    ("name", "found"),
    [("batchsize", "batch_size"), ("Meanflow", "MeanFlow"), ("opt", "optimizer"), ("xyz", None), ("o", None)],
)
def test_nearest(name, found):
    assert nearest(name, ["batch_size", "MeanFlow", "optimizer"]) == found


def test_without_a_near_name_few_names_are_listed():
    assert suggestion("xyz", ["b", "a", "b"]) == "choose one of a, b"
    assert suggestion("xyz", [str(i) for i in range(LISTED + 1)]) == "correct its name"
    assert suggestion("xyz", []) == "correct its name"
