import collections

import pytest
import torch

from lightning_distill.data.buckets import BucketSampler, aspect_buckets, nearest_bucket


@pytest.mark.parametrize(("height", "width", "multiple"), [(512, 512, 16), (1024, 1024, 32), (32, 32, 8), (256, 512, 16)])
@pytest.mark.parametrize("ratio", [1.0, 1.5, 2.0])
def test_buckets_have_equal_area_and_divisible_sides(height: int, width: int, multiple: int, ratio: float) -> None:
    buckets = aspect_buckets(height, width, multiple, ratio)
    assert (height, width) in buckets
    assert len(set(buckets)) == len(buckets)
    for h, w in buckets:
        assert h % multiple == w % multiple == 0
        assert h * w == pytest.approx(height * width, rel=0.5 * multiple * max(1 / h, 1 / w) + 1e-9)
        assert max(h, w) <= ratio * min(h, w) or (h, w) == (height, width)
    ratios = [h / w for h, w in buckets]
    assert ratios == sorted(ratios)
    if ratio == 2.0 and multiple == 16 and height == width:
        assert ratios[0] < 0.55
        assert ratios[-1] > 1.9


def test_nearest_bucket_has_the_closest_aspect_ratio() -> None:
    buckets = [(16, 32), (24, 24), (32, 16)]
    assert [nearest_bucket(h, w, buckets) for h, w in ((10, 100), (100, 10), (99, 101), (100, 130), (100, 160))] == [
        0,
        2,
        1,
        1,
        0,
    ]


def sampler(**settings: int) -> BucketSampler:
    buckets = [0] * 10 + [1] * 7 + [2] * 3 + [4] * 23
    return BucketSampler(torch.empty(43), buckets, **{"batch_size": 4, "seed": 1} | settings)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_batches_have_one_bucket_and_ranks_are_disjoint(replicas: int) -> None:
    parts = [sampler(num_replicas=replicas, rank=rank) for rank in range(replicas)]
    buckets = parts[0].buckets
    for epoch in range(3):
        orders = [part.indices(epoch) for part in parts]
        assert {len(order) for order in orders} == {len(parts[0])} == {8 // replicas * 4}  # 2 + 1 + 0 + 5 batches
        sampled = [index for order in orders for index in order]
        assert len(set(sampled)) == len(sampled)
        for order in orders:
            for start in range(0, len(order), 4):
                assert len({int(buckets[index]) for index in order[start : start + 4]}) == 1


def test_every_sample_of_a_full_bucket_is_used() -> None:
    counts = collections.Counter(index for epoch in range(200) for index in sampler().indices(epoch))
    assert set(counts) == {i for i in range(43) if not 17 <= i < 20}  # a bucket smaller than a batch is never used
    assert sampler().indices(0) != sampler().indices(1)
    assert sampler().indices(5) == sampler().indices(5)
    first = [int(sampler().buckets[sampler().indices(epoch)[0]]) for epoch in range(60)]
    assert set(first) == {0, 1, 4}  # batches are shuffled as well
