import itertools
import json
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
from lightning_distill.data.image_folder import UnreadableImageError, read_image
from lightning_distill.errors import ConfigurationError
from tests.toy import ToyModule, read_losses

SIZE = {"height": 16, "width": 16}


def write_folder(directory: Path, count: int, size: tuple[int, int] = (24, 20)) -> Path:
    """Pictures of one gray each, picture i of `(width, height)` with the value 10 i, and their metadata."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        Image.new("RGB", size, (10 * i,) * 3).save(directory / f"{i:03}.png")
        lines.append(json.dumps({"file_name": f"{i:03}.png", "text": f"picture {i}", "source": "a test"}))
    (directory / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "pictures", 20)


def ready(folder: Path, stage: str = "fit", **settings: Any) -> ImageFolder:
    data = ImageFolder(str(folder), **{"batch_size": 4, "validation_share": 0.1, "num_workers": 0, **SIZE} | settings)
    data.setup(stage)
    return data


def prompts(loader: DataLoader) -> list[str]:
    return [prompt for batch in loader for prompt in batch["prompt"]]


def test_training_batches(folder):
    batches = list(ready(folder).train_dataloader())
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


def test_the_validation_share_is_left_out_of_training(folder):
    data = ready(folder, batch_size=2)
    train, validation = prompts(data.train_dataloader()), prompts(data.val_dataloader())
    assert len(validation) == 2
    assert sorted(train + validation) == sorted(f"picture {i}" for i in range(20))
    assert [batch["index"].tolist() for batch in data.val_dataloader()] == [[0, 1]]


def test_the_validation_share_depends_on_the_file_names_alone(folder):
    chosen = prompts(ready(folder).val_dataloader())
    assert prompts(ready(folder, "validate", seed=7).val_dataloader()) == chosen
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(reversed(lines)))
    assert prompts(ready(folder).val_dataloader()) == chosen[::-1]


def test_captions_of_one_picture_stay_together(folder):
    lines = [json.dumps({"file_name": f"{i // 4:03}.png", "text": f"{i // 4} {i}"}) for i in range(20)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    data = ready(folder, validation_share=0.4)
    train, validation = (
        [text.split()[0] for text in prompts(loader)] for loader in (data.train_dataloader(), data.val_dataloader())
    )
    assert len(validation) == 8
    assert len(set(validation)) == 2
    assert not set(train) & set(validation)


def test_a_small_share_is_one_picture(folder):
    assert len(prompts(ready(folder, validation_share=0.001).val_dataloader())) == 1


def test_a_validation_directory(folder, tmp_path):
    other = write_folder(tmp_path / "validation", 3)
    data = ready(folder, validation_directory=str(other))
    assert len(prompts(data.train_dataloader())) == 20
    assert prompts(data.val_dataloader()) == prompts(data.test_dataloader()) == [f"picture {i}" for i in range(3)]
    assert prompts(ready(tmp_path / "absent", "validate", validation_directory=str(other)).val_dataloader())


def test_prediction_reads_no_pictures(folder):
    for path in folder.glob("*.png"):
        path.unlink()
    batches = list(ready(folder, "predict").predict_dataloader())
    assert all(batch.keys() == {"prompt", "index"} for batch in batches)
    assert sum(len(batch["prompt"]) for batch in batches) == 2


def test_pictures_are_scaled_to_cover_and_cropped_at_the_center(tmp_path):
    pixels = np.zeros((40, 120, 3), dtype=np.uint8)
    pixels[:, 40:80] = 255  # the middle third: what is left of a square crop
    pixels[:, 80:] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", 20, 20)
    assert image.shape == (3, 20, 20)
    assert torch.equal(image[:, :, 1:-1], torch.ones(3, 20, 18))  # the filter takes in a little of the neighbors
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    assert torch.equal(read_image(tmp_path / "tall.png", 20, 20), image.transpose(1, 2))
    upward = read_image(tmp_path / "wide.png", 80, 240)
    assert upward.shape == (3, 80, 240)
    assert (upward[:, :, :70] == -1).all()
    assert (upward[:, :, 90:150] == 1).all()


def test_reduction_is_antialiased(tmp_path):
    checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checkerboard).save(tmp_path / "board.png")
    image = read_image(tmp_path / "board.png", 8, 8)
    assert image.shape == (3, 8, 8)
    assert image.abs().max() < 0.05  # gray; nearest or unfiltered sampling gives black and white


def test_orientation_and_transparency(tmp_path):
    turned = Image.new("RGB", (30, 10), "red")
    turned.paste("blue", (15, 0, 30, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png", 30, 10)
    assert image[:, 0, 5].tolist() == [1, -1, -1]
    assert image[:, -1, 5].tolist() == [-1, -1, 1]
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png", 8, 8) == 1).all()


@pytest.mark.parametrize("taken", [0, 1, 3])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_goes_on_where_its_state_was_saved(folder, taken, num_workers):
    loader = ready(folder, num_workers=num_workers).train_dataloader()
    batches = iter(loader)
    for _ in itertools.islice(batches, taken):
        pass
    state = loader.state_dict()
    rest = [batch["prompt"] for batch in batches]
    resumed = ready(folder, num_workers=num_workers).train_dataloader()
    resumed.load_state_dict(state)
    assert [batch["prompt"] for batch in resumed] == rest
    assert len(rest) == 4 - taken


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
def test_resume_is_exact_in_the_middle_of_an_epoch(folder, tmp_path):
    seen = fit(tmp_path, "whole", folder)
    assert len(seen) == 8
    for step in (2, 4, 5):
        resumed = fit(tmp_path, f"resumed_{step}", folder, str(tmp_path / "whole" / f"step={step}.ckpt"))
        assert resumed == seen[step:]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("damage", ["missing", "no picture", "truncated", "deep"])
def test_unreadable_pictures_are_named(folder, damage, num_workers):
    path = folder / "005.png"
    if damage == "missing":
        path.unlink()
    elif damage == "no picture":
        path.write_text("<html>not found</html>")
    elif damage == "truncated":
        Image.fromarray(np.random.randint(0, 255, (24, 20, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:-200])
    else:
        Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(path)
    loader = ready(folder, num_workers=num_workers, validation_share=0.05).train_dataloader()
    with pytest.raises(UnreadableImageError) as caught:
        list(loader)
    message = str(caught.value)
    assert message.startswith(f"{path} of line 6 of {folder / 'metadata.jsonl'} cannot be read as a picture (")
    assert message.endswith("; replace the file or remove the line")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{file_name: 1}", "line 3 of .*metadata.jsonl is not a JSON object"),
        ("[1, 2]", 'line 3 of .*metadata.jsonl has no string under "file_name"'),
        ('{"text": "a cat"}', 'line 3 of .* has no string under "file_name"; correct or remove it'),
        ('{"file_name": "a.png"}', 'line 3 of .* has no string under "text"'),
        ('{"file_name": "a.png", "text": null}', 'line 3 of .* has no string under "text"'),
    ],
)
def test_bad_lines(tmp_path, line, message):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n\n' + line + "\n")
    with pytest.raises(ConfigurationError, match=message):
        ready(tmp_path)


def test_a_line_that_is_not_utf8(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "a.png", "text": "été"}'.encode("latin-1"))
    with pytest.raises(ConfigurationError, match="line 1 of"):
        ready(tmp_path)


def test_directories_that_cannot_work(folder, tmp_path):
    with pytest.raises(ConfigurationError, match=r"data.directory is '.*absent', which is not a directory"):
        ready(tmp_path / "absent")
    with pytest.raises(ConfigurationError, match=r"data.validation_directory is '.*absent', which is not a directory"):
        ready(folder, validation_directory=str(tmp_path / "absent"))
    with pytest.raises(ConfigurationError, match=r"which holds no metadata.jsonl; write one"):
        ready(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(ConfigurationError, match=r"metadata.jsonl of data.directory is empty"):
        ready(tmp_path)


def test_too_few_pictures_are_refused_at_set_up(folder):
    with pytest.raises(ConfigurationError, match=r"18 training samples do not hold a batch of data\.batch_size 19"):
        ready(folder, batch_size=19)
    assert prompts(ready(folder, "validate", batch_size=19).val_dataloader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 0}, "data.height is 0; set it to 1 or more pixels"),
        ({"width": -512}, "data.width is -512"),
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"num_workers": -1}, "data.num_workers is -1"),
        ({"validation_share": 0.0}, "data.validation_share is 0.0; set it above 0 and below 1"),
        ({"validation_share": 1.0}, "data.validation_share is 1.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        ImageFolder("pictures", **settings)


def test_loaders_before_setup():
    with pytest.raises(RuntimeError, match=r"call setup\(stage\) first"):
        ImageFolder("pictures").train_dataloader()
