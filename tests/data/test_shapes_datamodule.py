import itertools
from collections import Counter

import pytest
import torch

from lightning_distill.data import ShapesData
from lightning_distill.data.shapes import CATEGORIES, is_held_out, parse_prompt, prompts
from lightning_distill.errors import ConfigurationError


def ready(stage: str, **settings) -> ShapesData:
    data = ShapesData(**{"size": 60, "batch_size": 8, "prompts_per_category": 3} | settings)
    data.setup(stage)
    return data


def epoch(loader) -> dict:
    """All batches of a loader by index."""
    pictures = {}
    for batch in loader:
        for i, index in enumerate(batch["index"].tolist()):
            pictures[index] = (batch["prompt"][i], batch["image"][i])
    return pictures


def test_training_batches():
    batches = list(ready("fit").train_dataloader())
    assert len(batches) == 7
    for batch in batches:
        assert len(batch["prompt"]) == 8
        assert batch["image"].shape == (8, 3, 32, 32)
        assert batch["image"].dtype == torch.float32
        assert batch["image"].min() >= -1
        assert batch["image"].max() <= 1
        assert batch["index"].dtype == torch.int64
    indices = torch.cat([batch["index"] for batch in batches])
    assert len(indices.unique()) == 56
    assert indices.tolist() != sorted(indices.tolist())
    assert max(batch["image"].max() for batch in batches) == 1  # the whole range is used


def test_a_picture_depends_on_seed_and_index_alone():
    small, large = ready("fit", batch_size=10), ready("fit", size=80, batch_size=10)
    first, second = epoch(small.train_dataloader()), epoch(large.train_dataloader())
    assert len(first) == 60
    for index, (prompt, image) in first.items():
        assert second[index][0] == prompt
        assert torch.equal(second[index][1], image)
    other = epoch(ready("fit", batch_size=10, seed=1).train_dataloader())
    assert sum(torch.equal(other[index][1], image) for index, (_, image) in first.items()) == 0


def test_chunks_join_without_seams(monkeypatch):
    whole = epoch(ready("fit", batch_size=10).train_dataloader())
    monkeypatch.setattr("lightning_distill.data.shapes_datamodule._CHUNK", 7)
    chunked = epoch(ready("fit", batch_size=10).train_dataloader())
    assert all(torch.equal(chunked[index][1], image) and chunked[index][0] == text for index, (text, image) in whole.items())


def test_training_leaves_out_what_is_held_out():
    texts = ready("fit", size=2000)._train.texts
    assert not any(is_held_out(parse_prompt(text)) for text in texts)


def test_category_weights():
    counts = Counter(parse_prompt(text).category for text in ready("fit", size=3000)._train.texts)
    assert set(counts) == set(CATEGORIES)
    assert all(430 < count < 570 for count in counts.values())
    weights = {"counting": 3.0, "colors": 1.0}
    counts = Counter(parse_prompt(text).category for text in ready("fit", size=2000, category_weights=weights)._train.texts)
    assert set(counts) == {"counting", "colors"}
    assert 2.4 < counts["counting"] / counts["colors"] < 3.7


def test_validation_is_the_same_for_every_seed_and_balanced_in_every_batch():
    one, two = epoch(ready("validate").val_dataloader()), epoch(ready("validate", seed=5).val_dataloader())
    assert one.keys() == two.keys() == set(range(18))
    assert all(one[i][0] == two[i][0] and torch.equal(one[i][1], two[i][1]) for i in one)
    assert [parse_prompt(one[i][0]).category for i in range(6)] == list(CATEGORIES)
    assert Counter(parse_prompt(text).category for text, _ in one.values()) == dict.fromkeys(CATEGORIES, 3)


def test_prompts_are_cycled_where_a_category_has_fewer():
    texts = [text for text, _ in epoch(ready("validate", prompts_per_category=9).val_dataloader()).values()]
    singles = Counter(text for text in texts if parse_prompt(text).category == "single_object")
    assert sorted(singles.values()) == [2, 2, 2, 3]  # four prompts, nine times
    attributes = {text for text in texts if parse_prompt(text).category == "color_attr"}
    assert len(attributes) == 9
    assert len({parse_prompt(text).shapes for text in attributes}) > 3  # not the first nine of the list


def test_test_pictures_are_new():
    validation, test = epoch(ready("validate").val_dataloader()), epoch(ready("test").test_dataloader())
    assert [text for text, _ in validation.values()] == [text for text, _ in test.values()]
    # Some agree by chance: there are not many different pictures of four crosses.
    assert sum(torch.equal(validation[i][1], test[i][1]) for i in validation) < len(validation) / 4


def test_held_out_compositions():
    texts = [text for text, _ in epoch(ready("test", held_out=True).test_dataloader()).values()]
    assert len(texts) == 6
    assert all(is_held_out(parse_prompt(text)) for text in texts)
    assert {parse_prompt(text).category for text in texts} == set(prompts(held_out=True))


def test_prediction_has_prompts_and_no_pictures():
    batches = list(ready("predict").predict_dataloader())
    assert all(batch.keys() == {"prompt", "index"} for batch in batches)
    assert sum(len(batch["prompt"]) for batch in batches) == 18


def test_worker_processes_give_the_same_batches():
    plain, workers = ready("fit"), ready("fit", num_workers=2)
    for one, two in zip(plain.train_dataloader(), workers.train_dataloader(), strict=True):
        assert one["prompt"] == two["prompt"]
        assert torch.equal(one["image"], two["image"])


def test_loaders_leave_the_global_generator_alone():
    data = ready("fit")
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("taken", [0, 1, 6])
def test_a_loader_goes_on_where_its_state_was_saved(taken):
    loader = ready("fit").train_dataloader()
    batches = iter(loader)
    for _ in itertools.islice(batches, taken):
        pass
    state = loader.state_dict()
    rest = [batch["index"].tolist() for batch in batches]
    resumed = ready("fit").train_dataloader()
    resumed.load_state_dict(state)
    assert [batch["index"].tolist() for batch in resumed] == rest
    assert len(rest) == 7 - taken


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "data.size is 0; set it to 1 or more"),
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"prompts_per_category": -1}, "data.prompts_per_category is -1"),
        ({"size": 4, "batch_size": 8}, "data.batch_size 8 is larger than data.size 4"),
        ({"num_workers": -1}, "data.num_workers is -1"),
        ({"category_weights": {"colours": 1.0}}, "data.category_weights names 'colours'"),
        ({"category_weights": {"colors": -1.0}}, "give weights of 0 or more"),
        ({"category_weights": {"colors": 0.0}}, "at least one above 0"),
        ({"category_weights": {"colors": float("nan")}}, "give weights of 0 or more"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        ShapesData(**settings)


def test_loaders_before_setup():
    with pytest.raises(RuntimeError, match=r"call setup\(stage\) first"):
        ShapesData().val_dataloader()
