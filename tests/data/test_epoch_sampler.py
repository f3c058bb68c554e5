"""The order of training samples, and its position with other processes, batch sizes and data."""

import pytest
import torch

from lightning_distill.data.buckets import BucketSampler
from lightning_distill.data.epoch_sampler import EpochSampler

DATA = torch.utils.data.TensorDataset(torch.arange(50))
BUCKETS = [0] * 20 + [1] * 20 + [2] * 10


def test_each_epoch_has_every_sample_once_in_a_new_order():
    sampler = EpochSampler(DATA, batch_size=10, seed=3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] == list(EpochSampler(DATA, batch_size=10, seed=3))
    assert orders[0] != list(EpochSampler(DATA, batch_size=10, seed=4))


def test_ranks_split_an_epoch_into_full_batches():
    ranks = [EpochSampler(DATA, batch_size=8, num_replicas=3, rank=rank) for rank in range(3)]
    orders = [list(sampler) for sampler in ranks]
    assert [len(order) for order in orders] == [len(sampler) for sampler in ranks] == [16, 16, 16]
    assert len({index for order in orders for index in order}) == 48


@pytest.mark.parametrize(("batches", "epoch", "position"), [(0, 1, 0), (2, 1, 16), (6, 2, 0)])
def test_restored_sampler_resumes(batches, epoch, position):
    saved = EpochSampler(DATA, batch_size=8)
    saved.set_epoch(1)
    iter(saved)
    sampler = EpochSampler(DATA, batch_size=8)
    sampler.load_state_dict(saved.state_dict(batches))
    sampler.set_epoch(7)  # Lightning sets the epoch later, which does not change a restored position
    assert list(sampler) == sampler.indices(epoch)[position:]
    assert list(sampler) == sampler.indices(7)


def samplers(kind: type[EpochSampler], batch_size: int, processes: int, **settings: int) -> list[EpochSampler]:
    """The samplers of all processes."""
    data = (DATA, BUCKETS) if kind is BucketSampler else (DATA,)
    return [kind(*data, batch_size=batch_size, num_replicas=processes, rank=rank, **settings) for rank in range(processes)]


def consume(ranks: list[EpochSampler], steps: int) -> list[int]:
    """The samples of some steps of all processes; the state is that after them."""
    return [index for sampler in ranks for index in list(sampler)[: steps * sampler.batch_size]]


@pytest.mark.parametrize("kind", [EpochSampler, BucketSampler])
@pytest.mark.parametrize(("batch_size", "processes"), [(2, 2), (2, 1), (4, 1), (5, 1), (1, 8)])
def test_no_sample_repeats_with_other_processes_or_batch_sizes(kind, batch_size, processes):
    first = samplers(kind, 2, 4)
    used = consume(first, 3)
    second = samplers(kind, batch_size, processes)
    for sampler in second:
        sampler.load_state_dict(first[0].state_dict(3))
    assert {sampler.remaining_batches() for sampler in second} == {len(list(sampler)) // batch_size for sampler in second}

    for sampler in second:
        sampler.load_state_dict(first[0].state_dict(3))
    used += consume(second, 2)
    third = samplers(kind, 2, 2)
    for sampler in third:
        sampler.load_state_dict(second[0].state_dict(2))
    used += consume(third, 100)
    assert len(used) == len(set(used))
    assert len(used) > 50 - 4 - 3  # an incomplete step, and incomplete batches of buckets


def test_one_process_continues_the_order_of_two():
    two = samplers(EpochSampler, 4, 2)
    consume(two, 3)
    (one,) = samplers(EpochSampler, 8, 1)
    one.load_state_dict(two[0].state_dict(3))
    assert list(one) == one.indices(0)[24:]


def test_batches_of_buckets_keep_to_one_bucket_with_another_batch_size():
    (first,), (second,) = samplers(BucketSampler, 4, 1), samplers(BucketSampler, 3, 1)
    consume([first], 2)
    second.load_state_dict(first.state_dict(2))
    order = list(second)
    assert all(len({BUCKETS[index] for index in order[i : i + 3]}) == 1 for i in range(0, len(order), 3))


@pytest.mark.parametrize("samples", [7, 30, 44, 60])
def test_other_data_keeps_the_position_or_begins_the_next_epoch(samples):
    saved = EpochSampler(DATA, batch_size=5)
    iter(saved)
    sampler = EpochSampler(torch.utils.data.TensorDataset(torch.arange(samples)), batch_size=5)
    sampler.load_state_dict(saved.state_dict(8))
    assert list(sampler) == (sampler.indices(0)[40:] or sampler.indices(1))


def test_another_seed_keeps_the_position_in_another_order():
    saved = EpochSampler(DATA, batch_size=5)
    iter(saved)
    sampler = EpochSampler(DATA, batch_size=5, seed=1)
    sampler.load_state_dict(saved.state_dict(8))
    assert list(sampler) == sampler.indices(0)[40:]
