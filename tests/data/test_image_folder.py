import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from PIL import Image
from torch.utils.data import DataLoader

from lightning_distill.callbacks.checkpoint import AtomicCheckpoint
from lightning_distill.callbacks.random_state import RandomState
from lightning_distill.data import ImageFolder
from lightning_distill.data.image_files import UnreadableImageError
from lightning_distill.errors import ConfigurationError
from tests.toy import ToyModule, read_losses

SIZE = {"height": 16, "width": 16}


def write_folder(directory: Path, count: int, size: tuple[int, int] = (24, 20)) -> Path:
    """Write uniform gray images of size `(width, height)`, image i with the value 10 i, and their metadata."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        Image.new("RGB", size, (10 * i,) * 3).save(directory / f"{i:03}.png")
        lines.append(json.dumps({"file_name": f"{i:03}.png", "text": f"image {i}", "source": "a test"}))
    (directory / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "images", 20)


def set_up(folder: Path, stage: str = "fit", **settings: Any) -> ImageFolder:
    data = ImageFolder(str(folder), **{"batch_size": 4, "validation_share": 0.1, "num_workers": 0, **SIZE} | settings)
    data.setup(stage)
    return data


def prompts(loader: DataLoader) -> list[str]:
    return [prompt for batch in loader for prompt in batch["prompt"]]


def test_training_batches(folder):
    batches = list(set_up(folder).train_dataloader())
    assert len(batches) == 4
    for batch in batches:
        assert batch["image"].shape == (4, 3, 16, 16)
        assert batch["image"].dtype == torch.float32
        assert batch["index"].dtype == torch.int64
        for prompt, image in zip(batch["prompt"], batch["image"], strict=True):
            assert torch.allclose(image, torch.tensor(int(prompt.split()[1]) * 10 / 127.5 - 1))
    indices = torch.cat([batch["index"] for batch in batches]).tolist()
    assert len(set(indices)) == 16
    assert indices != sorted(indices)


def test_training_excludes_the_validation_share(folder):
    data = set_up(folder, batch_size=2)
    train, validation = prompts(data.train_dataloader()), prompts(data.val_dataloader())
    assert len(validation) == 2
    assert sorted(train + validation) == sorted(f"image {i}" for i in range(20))
    assert [batch["index"].tolist() for batch in data.val_dataloader()] == [[0, 1]]


def test_validation_share_depends_only_on_file_names(folder):
    expected = prompts(set_up(folder).val_dataloader())
    assert prompts(set_up(folder, "validate", seed=7).val_dataloader()) == expected
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(reversed(lines)))
    assert prompts(set_up(folder).val_dataloader()) == expected[::-1]


def test_captions_of_one_image_share_a_split(folder):
    lines = [json.dumps({"file_name": f"{i // 4:03}.png", "text": f"{i // 4} {i}"}) for i in range(20)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    data = set_up(folder, validation_share=0.4)
    train, validation = (
        [text.split()[0] for text in prompts(loader)] for loader in (data.train_dataloader(), data.val_dataloader())
    )
    assert len(validation) == 8
    assert len(set(validation)) == 2
    assert not set(train) & set(validation)


def test_small_validation_share_has_one_image(folder):
    assert len(prompts(set_up(folder, validation_share=0.001).val_dataloader())) == 1


def test_validation_directory(folder, tmp_path):
    other = write_folder(tmp_path / "validation", 3)
    data = set_up(folder, validation_directory=str(other))
    assert len(prompts(data.train_dataloader())) == 20
    assert prompts(data.val_dataloader()) == prompts(data.test_dataloader()) == [f"image {i}" for i in range(3)]
    assert prompts(set_up(tmp_path / "absent", "validate", validation_directory=str(other)).val_dataloader())


def test_predict_dataloader_loads_no_images(folder):
    for path in folder.glob("*.png"):
        path.unlink()
    batches = list(set_up(folder, "predict").predict_dataloader())
    assert all(batch.keys() == {"prompt", "index"} for batch in batches)
    assert sum(len(batch["prompt"]) for batch in batches) == 2


@pytest.mark.parametrize("consumed", [0, 1, 3])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_resumes_from_its_state(folder, consumed, num_workers):
    loader = set_up(folder, num_workers=num_workers).train_dataloader()
    batches = iter(loader)
    for _ in itertools.islice(batches, consumed):
        pass
    state = loader.state_dict()
    rest = [batch["prompt"] for batch in batches]
    resumed = set_up(folder, num_workers=num_workers).train_dataloader()
    resumed.load_state_dict(state)
    assert [batch["prompt"] for batch in resumed] == rest
    assert len(rest) == 4 - consumed


def fit(directory: Path, name: str, folder: Path, ckpt_path: str | None = None) -> list[tuple[int, float, list[int]]]:
    seed_everything(1 if ckpt_path else 0)
    checkpoint = AtomicCheckpoint(str(directory / name), filename="{step}", save_top_k=-1, every_n_train_steps=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=2, accelerator="cpu", callbacks=[checkpoint, RandomState()], **quiet)
    data = ImageFolder(str(folder), batch_size=4, validation_share=0.1, num_workers=0, height=32, width=32)
    losses = directory / f"{name}.jsonl"
    trainer.fit(ToyModule(losses=str(losses)), data, ckpt_path=ckpt_path)
    return read_losses(losses)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_mid_epoch_resume_is_exact(folder, tmp_path):
    losses = fit(tmp_path, "uninterrupted", folder)
    assert len(losses) == 8
    for step in (2, 4, 5):
        resumed = fit(tmp_path, f"resumed_{step}", folder, str(tmp_path / "uninterrupted" / f"step={step}.ckpt"))
        assert resumed == losses[step:]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("damage", ["not an image", "truncated"])
def test_error_names_the_unreadable_image(folder, damage, num_workers):
    path = folder / "005.png"
    if damage == "not an image":
        path.write_text("<html>not found</html>")
    else:
        Image.fromarray(np.random.randint(0, 255, (24, 20, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:-200])
    loader = set_up(folder, num_workers=num_workers, validation_share=0.05).train_dataloader()
    with pytest.raises(UnreadableImageError) as caught:
        list(loader)
    message = str(caught.value)
    assert message.startswith(f"{path}, named in line 6 of metadata.jsonl, cannot be decoded as an image (")
    assert message.endswith("; replace the file or remove its caption")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{file_name: 1}", "line 3 of .*metadata.jsonl is not JSON"),
        ("[1, 2]", "line 3 of .*metadata.jsonl is not a JSON object"),
        ('{"text": "a cat"}', 'line 3 of .* has no string under "file_name"; correct or remove it'),
        ('{"file_name": "a.png"}', 'line 3 of .* has no string under "text"'),
        ('{"file_name": "a.png", "text": null}', 'line 3 of .* has no string under "text"'),
    ],
)
def test_invalid_metadata_lines_raise(tmp_path, line, message):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n\n' + line + "\n")
    with pytest.raises(ConfigurationError, match=message):
        set_up(tmp_path)


def test_metadata_line_without_utf8_raises(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "a.png", "text": "été"}'.encode("latin-1"))
    with pytest.raises(ConfigurationError, match="line 1 of"):
        set_up(tmp_path)


def test_missing_files_are_counted_before_the_first_batch(folder):
    for name in ("005.png", "017.png"):
        (folder / name).unlink()
    os.mkfifo(folder / "017.png")
    with pytest.raises(ConfigurationError) as caught:
        set_up(folder)
    assert str(caught.value) == (
        f"2 image files of data.directory '{folder}' are missing or not regular files: '005.png', '017.png', first in line 6 "
        "of metadata.jsonl; names are relative to the directory: add the files, correct the names, or remove the lines"
    )
    lines = (folder / "metadata.jsonl").read_text().splitlines(keepends=True)
    (folder / "metadata.jsonl").write_text("".join(line for i, line in enumerate(lines) if i not in (5, 17)))
    assert sum(len(batch["prompt"]) for batch in set_up(folder, batch_size=1).train_dataloader()) == 16


def test_all_files_missing_by_a_wrong_prefix(folder):
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(text.replace('"file_name": "', '"file_name": "train/'))
    with pytest.raises(
        ConfigurationError, match=r"^20 image files of .*: 'train/000.png', 'train/001.png', 'train/002.png', ..., f"
    ):
        set_up(folder)


def test_max_pixels(folder):
    assert list(set_up(folder, max_pixels=480).train_dataloader())
    with pytest.raises(UnreadableImageError, match=r"24 x 20 pixels are more than data\.max_pixels 479"):
        list(set_up(folder, max_pixels=479).train_dataloader())


# Several captions


def list_captions(folder: Path) -> None:
    lines = [json.dumps({"file_name": f"{i:03}.png", "text": [f"{i} {word}" for word in "abcd"]}) for i in range(20)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def epoch_captions(data: ImageFolder, epochs: int) -> list[dict[str, str]]:
    loader = data.train_dataloader()
    found = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        found.append(dict(prompt.split() for batch in loader for prompt in batch["prompt"]))
    return found


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_epoch_chooses_one_of_several_captions(folder, num_workers):
    list_captions(folder)
    chosen = epoch_captions(set_up(folder, num_workers=num_workers, batch_size=1), 3)
    assert chosen == epoch_captions(set_up(folder, batch_size=2), 3)  # as the samples, whatever their batches
    assert chosen != epoch_captions(set_up(folder, batch_size=1, seed=1), 3)
    assert all(len(set(epoch.values())) > 1 for epoch in chosen)
    assert all(len({epoch[key] for epoch in chosen}) <= 3 for key in chosen[0])
    assert sum(chosen[0][key] != chosen[1][key] for key in chosen[0]) > 6


def test_validation_has_the_first_of_several_captions(folder):
    list_captions(folder)
    assert {prompt.split()[1] for prompt in prompts(set_up(folder).val_dataloader())} == {"a"}


def test_encoding_the_first_of_several_captions_is_said(folder):
    list_captions(folder)
    with pytest.warns(
        UserWarning, match=r"18 images of data\.directory have several captions: only the first of each is encoded"
    ):
        set_up(folder).splits()


def test_invalid_directories_raise(folder, tmp_path):
    with pytest.raises(ConfigurationError, match=r"data.directory is '.*absent', which is not a directory"):
        set_up(tmp_path / "absent")
    with pytest.raises(ConfigurationError, match=r"data.validation_directory is '.*absent', which is not a directory"):
        set_up(folder, validation_directory=str(tmp_path / "absent"))
    with pytest.raises(ConfigurationError, match=r"which has no metadata.jsonl, and no .txt beside its 20 images"):
        set_up(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(ConfigurationError, match=r"metadata.jsonl of data.directory has no captions"):
        set_up(tmp_path)


def test_setup_raises_for_too_few_samples(folder):
    with pytest.raises(ConfigurationError, match=r"18 training samples are too few for a batch of data\.batch_size 19"):
        set_up(folder, batch_size=19)
    assert prompts(set_up(folder, "validate", batch_size=19).val_dataloader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 0}, "data.height is 0; set it to 1 or more pixels"),
        ({"width": -512}, "data.width is -512"),
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"num_workers": -1}, "data.num_workers is -1"),
        ({"max_pixels": 0}, "data.max_pixels is 0; set it to 1 or more pixels"),
        ({"validation_share": 0.0}, "data.validation_share is 0.0; set it above 0 and below 1"),
        ({"validation_share": 1.0}, "data.validation_share is 1.0"),
    ],
)
def test_invalid_settings_raise(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        ImageFolder("images", **settings)


def test_loader_before_setup_raises():
    with pytest.raises(RuntimeError, match=r"call setup\(stage\) first"):
        ImageFolder("images").train_dataloader()
