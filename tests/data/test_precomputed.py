"""Precomputed data: same batches and order as the source data, exact resume, and error messages."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_distill.callbacks.checkpoint import AtomicCheckpoint
from lightning_distill.callbacks.images import LogImages
from lightning_distill.callbacks.random_state import RandomState
from lightning_distill.data import ImageText, Precomputed, Prompts, ShapesData
from lightning_distill.data.encoded_index import INDEX, EncodedIndex
from lightning_distill.errors import ConfigurationError
from tests.callbacks.distillation import PixelDistillation
from tests.data.test_image_text import write_broken_shard, write_shard
from tests.precomputing import encode, set_up
from tests.toy import ToyModule, read_losses


def shapes(**settings: Any) -> ShapesData:
    data = ShapesData(**{"size": 30, "batch_size": 4, "prompts_per_category": 2} | settings)
    data.setup()
    return data


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Precomputed Shapes: 30 training samples, 12 validation samples, seven samples per shard."""
    return encode(shapes(), tmp_path_factory.mktemp("shapes") / "precomputed")


@pytest.fixture
def images(tmp_path: Path) -> ImageText:
    """Images of three sizes, in three buckets."""
    for number in range(2):
        write_shard(tmp_path / "shards" / f"{number:03}.tar", 16 * number, 16)
    write_shard(tmp_path / "validation.tar", 0, 5)
    return image_text(tmp_path)


def image_text(folder: Path, **settings: Any) -> ImageText:
    sources = {"source": str(folder / "shards" / "*.tar"), "validation_source": str(folder / "validation.tar")}
    data = ImageText(**sources | {"batch_size": 2, "num_workers": 0, "height": 32, "width": 32, "multiple": 8} | settings)
    data.setup("fit")
    return data


@pytest.fixture
def _any_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the adapter accept prompts outside of Shapes; the condition is the prompt length."""

    def lengths(self: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
        return {"image": torch.tensor([[float(len(prompt))] for prompt in prompts])}

    monkeypatch.setattr("tests.callbacks.distillation.PixelAdapter.encode_prompt", lengths)


def assert_same_batches(found: Iterator[dict[str, Any]], expected: Iterator[dict[str, Any]]) -> int:
    count = 0
    for one, other in zip(found, expected, strict=True):
        assert one["prompt"] == other["prompt"]
        assert torch.equal(one["index"], other["index"])
        assert torch.equal(one["latents"], other["image"])
        count += 1
    return count


# The batches


@pytest.mark.parametrize("seed", [0, 5])
def test_batches_equal_the_source_batches(directory: Path, seed: int) -> None:
    data, original = set_up(directory, seed=seed), shapes()
    original.seed = seed  # changes only the order, because the images are already rendered
    assert assert_same_batches(data.train_dataloader(), original.train_dataloader()) == 7
    assert assert_same_batches(data.val_dataloader(), original.val_dataloader()) == 3
    for batch in data.train_dataloader():
        expected = PixelDistillation().adapter.encode_prompt(batch["prompt"])
        assert torch.equal(batch["condition"]["image"], expected["image"])


@pytest.mark.parametrize("rank", [0, 1])
def test_sharding_equals_the_source_sharding(directory: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_distill.data.resumable.ResumableData._replicas", lambda self: (2, rank))
    assert assert_same_batches(set_up(directory).train_dataloader(), shapes().train_dataloader()) == 3


@pytest.mark.usefixtures("_any_prompt")
def test_buckets_equal_the_source_buckets(images: ImageText, tmp_path: Path) -> None:
    data = set_up(encode(images, tmp_path / "precomputed"), batch_size=2)
    assert assert_same_batches(data.train_dataloader(), images.train_dataloader()) == 15
    assert len({batch["latents"].shape for batch in data.train_dataloader()}) == 3
    assert json.loads((tmp_path / "precomputed" / INDEX).read_text())["image_sizes"] == [[24, 40], [32, 32], [40, 24]]


@pytest.mark.usefixtures("_any_prompt")
def test_broken_images_are_counted_and_skipped(images: ImageText, tmp_path: Path) -> None:
    write_broken_shard(tmp_path, 10)  # the last seven samples are a separate shard
    with pytest.warns(UserWarning, match="ImageText skips broken"):
        encode(image_text(tmp_path), tmp_path / "precomputed")
    data = set_up(tmp_path / "precomputed", batch_size=1)
    seen = [(batch["prompt"][0], int(batch["index"])) for batch in data.train_dataloader()]
    assert sorted(seen) == sorted((f"image {i}", i) for i in range(32))
    index = json.loads((tmp_path / "precomputed" / INDEX).read_text())
    assert index["broken"] == {"train": 10, "validation": 0}
    assert "broken.tar" in index["shards"]["train"][-1]["broken"][0][1]


@pytest.mark.usefixtures("_any_prompt")
def test_prompts_without_images(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"{'a' * i}" for i in range(1, 21)))
    original = Prompts(str(tmp_path / "prompts.txt"), validation_samples=4, batch_size=4)
    data = set_up(encode(original, tmp_path / "precomputed"))
    assert not data.has_images
    for batch, expected in zip(data.train_dataloader(), original.train_dataloader(), strict=True):
        assert batch["prompt"] == expected["prompt"]
        assert batch["condition"]["image"].flatten().tolist() == [len(prompt) for prompt in batch["prompt"]]
        assert "latents" not in batch
    module = PixelDistillation()
    with pytest.raises(ConfigurationError, match="data is Precomputed, which has no images"):
        Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False).fit(module, data)


# Resume


@pytest.mark.parametrize("consumed", [1, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_resumes_from_its_state(directory: Path, consumed: int, num_workers: int) -> None:
    expected = [batch["index"].tolist() for batch in set_up(directory).train_dataloader()]
    loader = set_up(directory, num_workers=num_workers).train_dataloader()
    iterator = iter(loader)
    before = [next(iterator)["index"].tolist() for _ in range(consumed)]
    resumed = set_up(directory, num_workers=num_workers).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert before + [batch["index"].tolist() for batch in resumed] == expected


class LatentToyModule(ToyModule):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        return super().training_step({**batch, "image": batch["latents"]}, batch_idx)


def test_mid_epoch_resume_is_exact(directory: Path, tmp_path: Path) -> None:
    def fit(name: str, steps: int, **options: Any) -> object:
        seed_everything(0)
        losses = tmp_path / f"{name}.jsonl"
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=[RandomState(), AtomicCheckpoint(dirpath=str(tmp_path / name), every_n_train_steps=5)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(LatentToyModule(losses=str(losses)), Precomputed(str(directory), batch_size=4, num_workers=0), **options)
        return read_losses(losses)

    uninterrupted = fit("uninterrupted", 12)
    fit("part", 5)
    assert fit("part", 12, ckpt_path=tmp_path / "part" / "last.ckpt") == uninterrupted
    assert len(uninterrupted) == 12


# Prompts and error messages


def test_conditions_of_validation_prompts_and_the_empty_prompt(directory: Path) -> None:
    data = set_up(directory, "validate")
    adapter = PixelDistillation().adapter
    prompts = [prompt for batch in data.val_dataloader() for prompt in batch["prompt"]]
    repeated = [prompts[3], prompts[0], prompts[3]]
    assert torch.equal(data.encoded_prompts(repeated)["image"], adapter.encode_prompt(repeated)["image"])
    assert torch.equal(data.encoded_prompts([""])["image"], adapter.encode_prompt([""])["image"])
    mixed = data.encoded_prompts(["", prompts[1]])["image"]
    assert torch.equal(mixed, torch.cat([adapter.encode_prompt([p])["image"] for p in ("", prompts[1])]))
    with pytest.raises(ConfigurationError, match="the prompt 'a unicorn' is not among the validation prompts"):
        data.encoded_prompts([prompts[0], "a unicorn"])


def test_unknown_prompts_raise_before_networks_load(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[LogImages(["a unicorn"])], enable_checkpointing=False)
    monkeypatch.setattr(PixelDistillation, "configure_model", lambda self: pytest.fail("loaded"))
    with pytest.raises(ConfigurationError, match="'a unicorn' is not among the validation prompts"):
        trainer.fit(PixelDistillation(), Precomputed(str(directory), batch_size=4, num_workers=0))


def test_another_teacher_raises(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"family": "photographs"}
    monkeypatch.setattr("tests.callbacks.distillation.PixelAdapter.encoding_settings", lambda self: settings)
    monkeypatch.setattr(PixelDistillation, "configure_model", lambda self: pytest.fail("loaded"))
    with pytest.raises(
        ConfigurationError, match=r"was precomputed with another teacher \(adapter\.family was 'pixels', and is now 'photog"
    ):
        Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit(
            PixelDistillation(), Precomputed(str(directory), batch_size=4, num_workers=0)
        )


def test_trainable_text_encoders_raise(directory: Path) -> None:
    module = PixelDistillation()
    module.encoder.trains_text_encoders = True
    with pytest.raises(ConfigurationError, match=r"model\.train_text_encoders is true, and precomputed data"):
        Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit(
            module, Precomputed(str(directory), batch_size=4, num_workers=0)
        )


def damaged_copy(directory: Path, copy: Path, cut: bool = False) -> Path:
    """Copy precomputed data, with a flipped bit in its third shard, or without its last byte."""
    for path in directory.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    damaged = copy / "train-00002.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 4
    damaged.write_bytes(content[:-1] if cut else content)
    return copy


@pytest.mark.parametrize(("verify", "cut"), [(False, True), (True, False), (None, False)])
def test_damaged_files_raise(directory: Path, tmp_path: Path, verify: bool | None, cut: bool) -> None:
    set_up(directory, verify=verify)
    with pytest.raises(ConfigurationError, match=r"train-00002\.safetensors is missing or damaged"):
        set_up(damaged_copy(directory, tmp_path, cut), verify=verify)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_flipped_bit_is_found_when_the_sample_is_read(directory: Path, tmp_path: Path, num_workers: int) -> None:
    data = set_up(damaged_copy(directory, tmp_path), verify=False, num_workers=num_workers)
    with pytest.raises(ConfigurationError, match=r"train-00002\.safetensors is missing or damaged") as caught:
        list(data.train_dataloader())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"directory": "absent"}, r"data\.directory is 'absent', which has no index\.json"),
        ({"batch_size": 40}, "30 training samples are too few for a batch"),
        ({"batch_size": 0}, r"data\.batch_size is 0"),
        ({"num_workers": -1}, r"data\.num_workers is -1"),
    ],
)
def test_invalid_settings_raise(settings: dict[str, Any], message: str, directory: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Precomputed(**{"directory": str(directory)} | settings).setup("fit")


def test_unfinished_data_raises(directory: Path, tmp_path: Path) -> None:
    EncodedIndex(json.loads((directory / INDEX).read_text())["settings"]).write(tmp_path)
    with pytest.raises(ConfigurationError, match="where `precompute` has not finished; run the same command again"):
        Precomputed(str(tmp_path)).setup("fit")
