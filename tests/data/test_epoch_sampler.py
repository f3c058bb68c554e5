import pytest
import torch

from lightning_distill.data.epoch_sampler import EpochSampler

DATA = torch.utils.data.TensorDataset(torch.arange(50))


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


def test_epoch_is_read_at_the_first_sample():
    sampler = EpochSampler(DATA)
    early = iter(sampler)
    sampler.set_epoch(2)
    assert list(early) == sampler.indices(2)


@pytest.mark.parametrize(("yielded", "epoch", "position"), [(0, 1, 0), (20, 1, 20), (48, 2, 0)])
def test_restored_iterator_resumes(yielded, epoch, position):
    sampler = EpochSampler(DATA, batch_size=8)
    restored = iter(sampler)
    restored.load_state_dict({"epoch": 1, "yielded": yielded})
    sampler.set_epoch(7)  # Lightning sets the epoch later, which does not change a restored position
    assert list(restored) == sampler.indices(epoch)[position:]
