import itertools
from collections import Counter

import pytest
import torch

from lightning_distill.data import ShapesData
from lightning_distill.data.shapes import CATEGORIES, is_held_out, parse_prompt, prompts
from lightning_distill.errors import ConfigurationError


def set_up(stage: str, **settings) -> ShapesData:
    data = ShapesData(**{"size": 60, "batch_size": 8, "prompts_per_category": 3} | settings)
    data.setup(stage)
    return data


def epoch(loader) -> dict:
    """Prompt and image of each sample of a loader, by index."""
    samples = {}
    for batch in loader:
        for i, index in enumerate(batch["index"].tolist()):
            samples[index] = (batch["prompt"][i], batch["image"][i])
    return samples


def test_training_batches():
    batches = list(set_up("fit").train_dataloader())
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
    assert max(batch["image"].max() for batch in batches) == 1  # the images use the full range


def test_training_image_depends_only_on_seed_and_index():
    small, large = set_up("fit", batch_size=10), set_up("fit", size=80, batch_size=10)
    first, second = epoch(small.train_dataloader()), epoch(large.train_dataloader())
    assert len(first) == 60
    for index, (prompt, image) in first.items():
        assert second[index][0] == prompt
        assert torch.equal(second[index][1], image)
    other = epoch(set_up("fit", batch_size=10, seed=1).train_dataloader())
    assert sum(torch.equal(other[index][1], image) for index, (_, image) in first.items()) == 0


def test_chunk_size_does_not_change_the_images(monkeypatch):
    expected = epoch(set_up("fit", batch_size=10).train_dataloader())
    monkeypatch.setattr("lightning_distill.data.shapes_datamodule._CHUNK", 7)
    chunked = epoch(set_up("fit", batch_size=10).train_dataloader())
    assert all(torch.equal(chunked[index][1], image) and chunked[index][0] == text for index, (text, image) in expected.items())


def test_training_excludes_held_out_compositions():
    texts = set_up("fit", size=2000)._train.texts
    assert not any(is_held_out(parse_prompt(text)) for text in texts)


def test_category_weights():
    counts = Counter(parse_prompt(text).category for text in set_up("fit", size=3000)._train.texts)
    assert set(counts) == set(CATEGORIES)
    assert all(430 < count < 570 for count in counts.values())
    weights = {"counting": 3.0, "colors": 1.0}
    counts = Counter(parse_prompt(text).category for text in set_up("fit", size=2000, category_weights=weights)._train.texts)
    assert set(counts) == {"counting", "colors"}
    assert 2.4 < counts["counting"] / counts["colors"] < 3.7


def test_validation_is_independent_of_the_seed_and_balanced():
    one, two = epoch(set_up("validate").val_dataloader()), epoch(set_up("validate", seed=5).val_dataloader())
    assert one.keys() == two.keys() == set(range(18))
    assert all(one[i][0] == two[i][0] and torch.equal(one[i][1], two[i][1]) for i in one)
    assert [parse_prompt(one[i][0]).category for i in range(6)] == list(CATEGORIES)
    assert Counter(parse_prompt(text).category for text, _ in one.values()) == dict.fromkeys(CATEGORIES, 3)


def test_prompts_repeat_in_small_categories():
    texts = [text for text, _ in epoch(set_up("validate", prompts_per_category=9).val_dataloader()).values()]
    singles = Counter(text for text in texts if parse_prompt(text).category == "single_object")
    assert sorted(singles.values()) == [2, 2, 2, 3]  # four prompts, nine times
    attributes = {text for text in texts if parse_prompt(text).category == "color_attr"}
    assert len(attributes) == 9
    assert len({parse_prompt(text).shapes for text in attributes}) > 3  # not the first nine of the list


def test_test_split_has_new_images():
    validation, test = epoch(set_up("validate").val_dataloader()), epoch(set_up("test").test_dataloader())
    assert [text for text, _ in validation.values()] == [text for text, _ in test.values()]
    # Some images are equal by chance, because four crosses have few possible images.
    assert sum(torch.equal(validation[i][1], test[i][1]) for i in validation) < len(validation) / 4


def test_held_out_compositions():
    texts = [text for text, _ in epoch(set_up("test", held_out=True).test_dataloader()).values()]
    assert len(texts) == 6
    assert all(is_held_out(parse_prompt(text)) for text in texts)
    assert {parse_prompt(text).category for text in texts} == set(prompts(held_out=True))


def test_predict_dataloader_has_no_images():
    batches = list(set_up("predict").predict_dataloader())
    assert all(batch.keys() == {"prompt", "index"} for batch in batches)
    assert sum(len(batch["prompt"]) for batch in batches) == 18


def test_workers_load_the_same_batches():
    plain, workers = set_up("fit"), set_up("fit", num_workers=2)
    for one, two in zip(plain.train_dataloader(), workers.train_dataloader(), strict=True):
        assert one["prompt"] == two["prompt"]
        assert torch.equal(one["image"], two["image"])


def test_loaders_do_not_change_the_global_generator():
    data = set_up("fit")
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("consumed", [0, 1, 6])
def test_loader_resumes_from_its_state(consumed):
    loader = set_up("fit").train_dataloader()
    batches = iter(loader)
    for _ in itertools.islice(batches, consumed):
        pass
    state = loader.state_dict()
    rest = [batch["index"].tolist() for batch in batches]
    resumed = set_up("fit").train_dataloader()
    resumed.load_state_dict(state)
    assert [batch["index"].tolist() for batch in resumed] == rest
    assert len(rest) == 7 - consumed


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
def test_invalid_settings_raise(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        ShapesData(**settings)


def test_loader_before_setup_raises():
    with pytest.raises(RuntimeError, match=r"call setup\(stage\) first"):
        ShapesData().val_dataloader()
