import errno
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer, seed_everything
from PIL import ExifTags, Image

from lightning_distill.callbacks.checkpoint import AtomicCheckpoint
from lightning_distill.callbacks.random_state import RandomState
from lightning_distill.data import ImageText
from lightning_distill.data.image_files import UnreadableImageError
from lightning_distill.data.tar_shards import TarShards
from lightning_distill.errors import ConfigurationError
from lightning_distill.methods import FlowMatching, MeanFlow
from tests.data.tar_files import add, encoded_image, write_tar
from tests.methods.gaussian_adapter import GaussianAdapter
from tests.methods.gaussian_runs import VALIDATION
from tests.toy import ToyModule, read_losses

SHAPES = [(32, 32), (24, 44), (46, 22)]


def write_shard(path: Path, first: int, count: int) -> Path:
    """Write uniform gray images, image i with the value 5 i, in three sizes, with alternating text and JSON captions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i in range(first, first + count):
            add(archive, f"part/{i:04}.png", encoded_image(5 * i, SHAPES[i % 3]))
            if i % 2:
                add(archive, f"part/{i:04}.json", json.dumps({"caption": f"image {i}", "other": 1}).encode())
            else:
                add(archive, f"part/{i:04}.txt", f"image {i}\n".encode())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        write_shard(tmp_path / "shards" / f"{number:03}.tar", 16 * number, 16)
    write_shard(tmp_path / "validation.tar", 0, 5)
    return tmp_path


def set_up(folder: Path, stage: str = "fit", **settings: Any) -> ImageText:
    defaults = {"batch_size": 4, "num_workers": 0, "height": 32, "width": 32, "multiple": 8}
    shards = {"source": str(folder / "shards" / "*.tar"), "validation_source": str(folder / "validation.tar")}
    data = ImageText(**shards | defaults | settings)
    data.setup(stage)
    return data


def test_batches_have_one_shape_and_images_match_captions(folder: Path) -> None:
    shapes, seen = set(), []
    for batch in set_up(folder).train_dataloader():
        assert batch["image"].dtype == torch.float32
        assert batch["broken"] == []
        shapes.add(tuple(batch["image"].shape[1:]))
        for prompt, image in zip(batch["prompt"], batch["image"], strict=True):
            assert torch.allclose(image, torch.tensor(int(prompt.split()[1]) * 5 / 127.5 - 1), atol=1e-5)
            seen.append(prompt)
    assert len(seen) == len(set(seen)) == 48
    assert shapes == {(3, 32, 32), (3, 24, 40), (3, 40, 24)}


def test_single_bucket_has_the_configured_size(folder: Path) -> None:
    batches = list(set_up(folder, largest_ratio=1.0, height=16, width=24).train_dataloader())
    assert {tuple(batch["image"].shape) for batch in batches} == {(4, 3, 16, 24)}


def test_validation_has_the_configured_size_in_order(folder: Path) -> None:
    data = set_up(folder, "validate", validation_samples=3)
    (batch,) = data.val_dataloader()
    assert batch["prompt"] == ["image 0", "image 1", "image 2"]
    assert batch["image"].shape == (3, 3, 32, 32)


def rotated_image(size: tuple[int, int], kind: str) -> bytes:
    """Encode an image with an EXIF rotation of 90 degrees, as cameras store portraits."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", size).save(file, kind, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "ending"), [("JPEG", "jpg"), ("WEBP", "webp"), ("PNG", "png")])
def test_buckets_follow_the_exif_orientation(kind: str, ending: str, folder: Path) -> None:
    with tarfile.open(folder / "portrait.tar", "w") as archive:
        for i in range(4):
            add(archive, f"{i}.{ending}", rotated_image((44, 24), kind))
            add(archive, f"{i}.txt", b"a portrait")
    (batch,) = set_up(folder, source=str(folder / "portrait.tar")).train_dataloader()
    height, width = batch["image"].shape[-2:]
    assert height > width


def test_min_side_skips_small_images(folder: Path) -> None:
    prompts = [prompt for batch in set_up(folder, min_side=25).train_dataloader() for prompt in batch["prompt"]]
    assert len(prompts) == 16
    assert {int(prompt.split()[1]) % 3 for prompt in prompts} == {0}


# Shards


def test_index_is_reused_until_the_shard_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "shards" / "000.tar"
    first = TarShards([path])
    with monkeypatch.context() as patch:
        patch.setattr("lightning_distill.data.tar_shards.scan", lambda path, caption_column: pytest.fail("scanned again"))
        assert TarShards([path]).samples == first.samples
    assert first.open_image(2).read() == encoded_image(10, SHAPES[2])
    write_shard(path, 0, 15)
    assert len(TarShards([path])) == 15


def test_index_that_cannot_be_stored_is_kept_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    message = (
        r"The index of 3 tar files cannot be stored next to them \(first .*/000\.tar: no space left on the disk of .*\); each"
    )
    monkeypatch.setattr("os.fsync", sync)
    with pytest.warns(UserWarning, match=message):
        data = set_up(folder)
    monkeypatch.setattr("lightning_distill.data.tar_shards.scan", lambda path, caption_column: pytest.fail("scanned again"))
    data.prepare_data()
    assert len(data.open_source(train=True)) == 48
    assert not list((folder / "shards").glob("*index*"))


def test_a_shard_that_changes_after_its_headers_were_read_raises(folder: Path) -> None:
    shards = TarShards([folder / "shards" / "000.tar"])
    write_shard(folder / "shards" / "000.tar", 1, 16)
    with pytest.raises(UnreadableImageError, match=r"000\.tar changed after its headers were read; start again"):
        shards.open_image(0)


def test_few_shards_are_open_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_distill.data.tar_shards.MAX_OPEN_SHARDS", 2)
    shards = TarShards(sorted((folder / "shards").glob("*.tar")))
    for index in (0, 20, 3, 40, 5, 21):
        assert shards.open_image(index).read() == encoded_image(5 * index, SHAPES[index % 3])
        assert len(shards._files) <= 2


def test_shards_without_captioned_images_raise(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "a.png", encoded_image(0, (8, 8)))
        add(archive, "b.txt", b"without an image")
    message = (
        r"no image .* with a caption .*'text'\); skipped images without a caption: 1 \(first a\.png in .*x\.tar\); captions"
    )
    with pytest.raises(ConfigurationError, match=message):
        TarShards([path], caption_column="text")


@pytest.mark.parametrize("source", ["{000..002}.tar", "000.tar::00[12].tar", ["00{0,1}.tar", "002.tar"]])
def test_patterns_of_shards(source: str | list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "shards")
    assert len(set_up(folder, source=source).open_source(train=True)) == 48


def test_what_is_skipped_is_one_line_per_source(folder: Path) -> None:
    with tarfile.open(folder / "shards" / "003.tar", "w") as archive:
        add(archive, "bare.png", encoded_image(0, (8, 8)))
        add(archive, "torn.png", b"not an image")
        add(archive, "cut.png", encoded_image(0, (32, 32)))
        add(archive, "cut.json", b'{"caption": "half \\ud83d"}')
    with pytest.warns(UserWarning, match="ImageText") as caught:
        set_up(folder, max_pixels=10**6)
    lines = [str(warning.message) for warning in caught if str(warning.message).startswith("ImageText ")]
    source, place = repr(str(folder / "shards" / "*.tar")), folder / "shards" / "003.tar"
    assert lines == [
        f"ImageText skips in data.source {source}: images that are unreadable: 1 (first torn.png in {place}); images without a "
        f"caption: 1 (first bare.png in {place})",
        f"ImageText notes in data.source {source}: captions with half a character (a lone surrogate), replaced by U+FFFD: 1 "
        f"(first cut.png in {place})",
    ]


def test_images_in_small_buckets_are_counted(folder: Path) -> None:
    write_shard(folder / "shards" / "003.tar", 0, 1)  # 17 images in the first bucket, 16 in each of the others
    with pytest.warns(UserWarning, match=r"never trains on 32 images, in buckets of fewer than data\.batch_size 17 images"):
        set_up(folder, batch_size=17)


# Broken images


def write_broken_shard(folder: Path, count: int) -> None:
    """Write a shard of images with a valid header and truncated pixel data."""
    with tarfile.open(folder / "shards" / "broken.tar", "w") as archive:
        for i in range(count):
            add(archive, f"broken {i}.png", encoded_image(0, (32, 32))[:60])
            add(archive, f"broken {i}.txt", b"broken")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_broken_images_are_replaced_and_reported(folder: Path, batch_size: int) -> None:
    write_broken_shard(folder, 2)
    data = set_up(folder, largest_ratio=1.0, batch_size=batch_size)
    batches = list(data.train_dataloader())
    broken = [description for batch in batches for description in batch["broken"]]
    decoded = [prompt for batch in batches for prompt in batch["prompt"]]
    assert {len(batch["prompt"]) for batch in batches} == {batch_size}
    assert all(len(set(batch["index"].tolist())) == batch_size for batch in batches)
    assert "broken" not in decoded
    assert len(set(broken)) == 2 if batch_size == 1 else len(broken) > 0
    assert all("broken.tar" in description for description in broken)
    with pytest.warns(UserWarning, match="skips broken"):
        transferred = [data.on_before_batch_transfer(batch, 0) for batch in batches]
    assert not any("broken" in batch for batch in transferred)
    assert data.state_dict() == {"seen": len(decoded) + len(broken), "broken": len(broken)}


def test_replacements_are_of_the_same_size_and_repeatable(folder: Path) -> None:
    write_broken_shard(folder, 2)
    data = set_up(folder)
    train = data.require_setup(data._train)
    for index in (48, 49):
        batch = train[index]
        assert len(batch["broken"]) >= 1
        assert train.sizes[int(batch["index"])] == train.sizes[index]
        assert torch.equal(train[index]["index"], batch["index"])
        assert data.splits()["train"][index]["prompt"] == []


def test_each_epoch_chooses_one_of_several_captions(tmp_path: Path) -> None:
    members = []
    for i in range(12):
        members += [
            (f"{i}.png", encoded_image(i, (32, 32))),
            (f"{i}.json", json.dumps({"text": [f"{i} {c}" for c in "abc"]}).encode()),
        ]
    source = str(write_tar(tmp_path / "x.tar", members))

    def epoch(number: int, num_workers: int = 0) -> dict[int, str]:
        data = set_up(tmp_path, source=source, validation_source=source, num_workers=num_workers)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        return {int(index): prompt for batch in loader for index, prompt in zip(batch["index"], batch["prompt"], strict=True)}

    first = epoch(0)
    assert all(prompt.split()[0] == str(index) for index, prompt in first.items())
    assert first == epoch(0, num_workers=1) != epoch(1)
    assert len({prompt[-1] for prompt in first.values()}) > 1
    data = set_up(tmp_path, source=source, validation_source=source)
    assert [prompt for batch in data.val_dataloader() for prompt in batch["prompt"]] == [f"{i} a" for i in range(12)]
    with pytest.warns(UserWarning, match=r"12 images of data\.source have several captions: only the first of each is encoded"):
        assert data.splits()["train"][3]["prompt"] == ["3 a"]


def test_images_above_max_pixels_are_broken(folder: Path) -> None:
    data = set_up(folder, max_pixels=1050, batch_size=1, largest_ratio=1.0)
    descriptions = [description for batch in data.train_dataloader() for description in batch["broken"]]
    assert len(set(descriptions)) == 16
    assert all("pixels are more than data.max_pixels 1050" in description for description in descriptions)


def test_a_damaged_shard_is_one_broken_image_after_another(folder: Path) -> None:
    data = set_up(folder)
    for path in (folder / "shards").glob("*.tar"):
        path.unlink()
    batch = next(iter(data.train_dataloader()))
    assert batch["prompt"] == []
    assert "No such file or directory" in batch["broken"][0]


def test_too_many_broken_images_raise() -> None:
    data = ImageText("x.tar", "y.tar", max_broken_share=0.01)
    data.load_state_dict({"seen": 1500, "broken": 14})
    good = {"prompt": ["a"] * 4, "broken": []}
    data.on_before_batch_transfer(dict(good), 0)
    with pytest.raises(UnreadableImageError, match=r"16 of 1509 images .* data\.max_broken_share 0\.01"):
        data.on_before_batch_transfer({"prompt": ["a"] * 3, "broken": ["b", "c"]}, 0)


def test_batch_of_only_broken_images_raises(folder: Path) -> None:
    for path in (folder / "shards").glob("*.tar"):
        path.unlink()
    write_broken_shard(folder, 8)
    data = set_up(folder)
    batch = next(iter(data.train_dataloader()))
    with (
        pytest.warns(UserWarning, match="skips broken"),
        pytest.raises(UnreadableImageError, match="no image of a batch can be decoded, first broken"),
    ):
        data.on_before_batch_transfer(batch, 0)


# Captions


@pytest.mark.parametrize("method", [FlowMatching, MeanFlow])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_caption_dropout_of_methods(method: type[FlowMatching | MeanFlow], share: float, folder: Path, tmp_path: Path) -> None:
    adapter = GaussianAdapter(student="small", teacher="small")
    seen: list[torch.Tensor] = []

    def record(part: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if part is module.student and torch.is_grad_enabled():
            seen.append(arguments[-1])

    module = method(adapter, caption_dropout=share, validation=VALIDATION)
    module.configure_model()
    module.student.register_forward_pre_hook(record)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    trainer = Trainer(max_steps=24, limit_val_batches=0, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, datamodule=set_up(folder))
    dropped = (torch.cat(seen) == 0).float().mean()  # the condition is the caption length, 0 for the empty caption
    assert len(torch.cat(seen)) == 96
    assert dropped == 0 if share == 0 else 0.35 < dropped < 0.65


# Resume


@pytest.mark.parametrize("consumed", [1, 5])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_resumes_from_its_state(folder: Path, consumed: int, num_workers: int) -> None:
    expected = [batch["prompt"] for batch in set_up(folder).train_dataloader()]
    loader = set_up(folder, num_workers=num_workers).train_dataloader()
    iterator = iter(loader)
    before = [next(iterator)["prompt"] for _ in range(consumed)]
    state = loader.state_dict()
    resumed = set_up(folder, num_workers=num_workers).train_dataloader()
    resumed.load_state_dict(state)
    assert before + [batch["prompt"] for batch in resumed] == expected


def test_mid_epoch_resume_is_exact(folder: Path, tmp_path: Path) -> None:
    def fit(name: str, steps: int, **options: Any) -> object:
        seed_everything(0)
        losses = tmp_path / f"{name}.jsonl"
        callbacks = [RandomState(), AtomicCheckpoint(dirpath=str(tmp_path / name), every_n_train_steps=5)]
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=tmp_path,
        )
        trainer.fit(ToyModule(losses=str(losses)), datamodule=set_up(folder, largest_ratio=1.0), **options)
        return read_losses(losses)

    uninterrupted = fit("uninterrupted", 16)
    fit("part", 5)
    resumed = fit("part", 16, ckpt_path=tmp_path / "part" / "last.ckpt")
    assert resumed == uninterrupted
    assert len(uninterrupted) == 16


# Settings


@pytest.mark.parametrize("source", ["a-{0..1}.tar", "['a-0.tar', 'a-1.tar']", "[a-0.tar, a-1.tar]", "a-0.tar::a-1.tar"])
def test_sources_on_the_command_line(source: str) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(ImageText, "data")
    data = parser.instantiate_classes(parser.parse_args([f"--data.source={source}", "--data.validation_source=b.tar"])).data
    assert data.source == (["a-0.tar", "a-1.tar"] if source.startswith("[") else source)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 20}, r"data\.height is 20; set it to a multiple of data\.multiple, 8"),
        ({"largest_ratio": 0.5}, r"data\.largest_ratio is 0\.5"),
        ({"max_broken_share": 1.0}, r"data\.max_broken_share is 1\.0"),
        ({"validation_samples": 0}, r"data\.validation_samples is 0"),
        ({"min_side": -1}, r"data\.min_side is -1"),
        ({"max_pixels": 0}, r"data\.max_pixels is 0"),
        ({"source": "absent/*.tar"}, r"data\.source is 'absent/\*\.tar', which matches no file"),
        ({"validation_source": None}, r"data\.validation_source is null, but tar files have no validation split"),
        ({"batch_size": 100}, "48 training samples are too few for a batch"),
        ({"batch_size": 17}, "the buckets have fewer full batches"),
    ],
)
def test_invalid_settings_raise(settings: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        set_up(folder, **settings)
