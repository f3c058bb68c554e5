import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_distill.callbacks.random_state import RandomState, random_state, set_random_state


def random_numbers() -> tuple:
    return random.random(), random.gauss(0, 1), np.random.normal(), torch.randn(3).tolist()


def test_all_generators_are_restored():
    random_numbers()  # leaves the second normal number of a pair in each generator
    state = random_state()
    first = random_numbers()
    assert random_numbers() != first
    set_random_state(state)
    assert random_numbers() == first


def test_state_loads_with_weights_only(tmp_path):
    state = random_state()
    torch.save(state, tmp_path / "state.pt")
    first = random_numbers()
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert random_numbers() == first


class FakeTrainer:
    world_size = 1
    global_rank = 0
    global_step = 7
    state = SimpleNamespace(fn="fit")


@pytest.mark.parametrize(
    ("checkpoint", "reason"), [({}, "has no random states"), ({"random_state": [{}, {}]}, "the random states of 2 processes")]
)
def test_checkpoint_without_matching_states_gives_a_warning(checkpoint, reason):
    callback = RandomState()
    with pytest.warns(UserWarning, match=reason):
        callback.on_load_checkpoint(FakeTrainer(), None, checkpoint)
    before = random_numbers()
    callback.on_train_batch_start(FakeTrainer(), None, None, 0)
    assert random_numbers() != before


def test_new_random_numbers_differ_from_those_of_the_first_steps():
    callback = RandomState()
    with pytest.warns(UserWarning, match="continues with new random numbers"):
        callback.on_load_checkpoint(FakeTrainer(), None, {})
    torch.manual_seed(3)
    first = torch.randn(3).tolist()
    torch.manual_seed(3)
    callback.on_train_batch_start(FakeTrainer(), None, None, 0)
    assert torch.randn(3).tolist() != first


def test_checkpoint_before_the_restore_has_the_loaded_states():
    saved, again = {}, {}
    RandomState().on_save_checkpoint(FakeTrainer(), None, saved)
    random_numbers()
    callback = RandomState()
    callback.on_load_checkpoint(FakeTrainer(), None, saved)
    callback.on_validation_start(FakeTrainer(), None)
    callback.on_save_checkpoint(FakeTrainer(), None, again)
    assert torch.equal(again["random_state"][0]["torch"], saved["random_state"][0]["torch"])
