import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_distill.callbacks.random_state import RandomState, random_state, set_random_state


def draw() -> tuple:
    return random.random(), random.gauss(0, 1), np.random.normal(), torch.randn(3).tolist()


def test_all_generators_come_back():
    draw()  # leaves half of a pair of normals behind in each generator
    state = random_state()
    first = draw()
    assert draw() != first
    set_random_state(state)
    assert draw() == first


def test_the_state_loads_without_pickles(tmp_path):
    state = random_state()
    torch.save(state, tmp_path / "state.pt")
    first = draw()
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == first


class FakeTrainer:
    world_size = 1
    global_rank = 0
    global_step = 7
    state = SimpleNamespace(fn="fit")


@pytest.mark.parametrize(
    ("checkpoint", "reason"), [({}, "without random states"), ({"random_state": [{}, {}]}, "by 2 processes")]
)
def test_other_checkpoints_are_resumed_with_a_warning(checkpoint, reason):
    callback = RandomState()
    with pytest.warns(UserWarning, match=reason):
        callback.on_load_checkpoint(FakeTrainer(), None, checkpoint)
    before = draw()
    callback.on_train_batch_start(FakeTrainer(), None, None, 0)
    assert draw() != before


def test_fresh_randomness_is_not_that_of_the_first_steps():
    callback = RandomState()
    with pytest.warns(UserWarning, match="fresh randomness"):
        callback.on_load_checkpoint(FakeTrainer(), None, {})
    torch.manual_seed(3)
    first = torch.randn(3).tolist()
    torch.manual_seed(3)
    callback.on_train_batch_start(FakeTrainer(), None, None, 0)
    assert torch.randn(3).tolist() != first


def test_a_checkpoint_before_training_goes_on_has_what_it_is_to_go_on_with():
    saved, again = {}, {}
    RandomState().on_save_checkpoint(FakeTrainer(), None, saved)
    draw()
    callback = RandomState()
    callback.on_load_checkpoint(FakeTrainer(), None, saved)
    callback.on_validation_start(FakeTrainer(), None)
    callback.on_save_checkpoint(FakeTrainer(), None, again)
    assert torch.equal(again["random_state"][0]["torch"], saved["random_state"][0]["torch"])
