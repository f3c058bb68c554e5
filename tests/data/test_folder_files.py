from pathlib import Path

import pytest
from PIL import Image

from lightning_distill.data import ImageFolder
from lightning_distill.data.folder_captions import CaptionedImage
from lightning_distill.data.folder_files import find_files
from lightning_distill.errors import ConfigurationError
from tests.data.tables import write_table

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def write_images(directory: Path, *names: str) -> Path:
    for name in names or ("0.png", "1.png", "2.png"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(directory / name, "PNG")
    return directory


def located(directory: Path, *names: str, may_be_missing: bool = False) -> list[str]:
    samples = [CaptionedImage(name, ("a",), f"line {number}") for number, name in enumerate(names, start=1)]
    found = find_files(directory, samples, "data.directory", may_be_missing=may_be_missing)
    return [sample.file_name for sample in found]


def test_files_outside_the_directory_are_counted(tmp_path: Path) -> None:
    inside, outside = write_images(tmp_path / "images"), write_images(tmp_path / "images_2")
    names = ["0.png", "./1.png", "../images_2/0.png", str(outside / "1.png"), str(inside / "2.png"), "a/../2.png"]
    with pytest.warns(
        UserWarning, match=r"^2 image files of data\.directory .* are outside of it: '\.\./images_2/0\.png', "
    ) as caught:
        assert located(inside, *names) == names
    assert len(caught) == 1


@pytest.mark.parametrize(
    "name", ["absent.png", "absent/0.png", "sub", "null\0.png", "cut \ud83d.png", "a" * 300, "sub/../../0.png"]
)
def test_names_of_no_file_raise(name: str, tmp_path: Path) -> None:
    write_images(tmp_path, "0.png", "sub/0.png")
    with pytest.raises(
        ConfigurationError, match=r"^1 image files of data\.directory .* are missing or not regular files: "
    ) as caught:
        located(tmp_path, "0.png", name)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_names_from_windows(tmp_path: Path) -> None:
    write_images(tmp_path, "sub/0.png", "odd\\name.png")
    assert located(tmp_path, "sub\\0.png", "odd\\name.png") == ["sub/0.png", "odd\\name.png"]
    with pytest.raises(ConfigurationError, match=r" 'C:\\pics\\a\.png', first in line 1"):  # as written
        located(tmp_path, r"C:\pics\a.png")


@pytest.mark.parametrize(("written", "on_disk"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_names_in_another_normal_form(written: str, on_disk: str, tmp_path: Path) -> None:
    write_images(tmp_path / "images", f"{on_disk}.png", f"{on_disk}/{on_disk}.png", "0.png")
    assert located(tmp_path / "images", f"{written}.png", f"{written}/{written}.png", f"./{written}\\{on_disk}.png") == [
        f"{on_disk}.png",
        f"{on_disk}/{on_disk}.png",
        f"./{on_disk}/{on_disk}.png",
    ]
    path = str(tmp_path / "images" / f"{written}.png")
    assert located(tmp_path / "images", path) == [path.replace(written, on_disk)]
    write_images(tmp_path / "images", f"{written}.png")  # now both exist
    assert located(tmp_path / "images", f"{written}.png", f"{on_disk}.png") == [f"{written}.png", f"{on_disk}.png"]


def test_normal_forms_that_fit_several_files_are_missing(tmp_path: Path) -> None:
    forms = ["\u1e69", "s\u0323\u0307", "\u1e63\u0307"]  # of one character, s with two dots
    write_images(tmp_path, f"{forms[0]}.png", f"{forms[1]}.png")
    with pytest.raises(ConfigurationError, match=r"^1 image files of data\.directory"):
        located(tmp_path, f"{forms[2]}.png")


def test_prediction_has_the_validation_captions_of_training(tmp_path: Path) -> None:
    """Whether the files exist or not, and whatever the form of their names."""
    rows = [{"file_name": f"sub\\{COMPOSED}{i}.png", "text": f"image {i}"} for i in range(8)]
    write_table(tmp_path / "metadata.jsonl", rows)
    assert located(tmp_path, rows[0]["file_name"], may_be_missing=True) == [rows[0]["file_name"]]

    def validation(stage: str) -> list[str]:
        data = ImageFolder(str(tmp_path), validation_share=0.4, height=8, width=8, num_workers=0)
        data.setup(stage)
        return [prompt for batch in data.predict_dataloader() for prompt in batch["prompt"]]

    predicted = validation("predict")
    write_images(tmp_path, *(f"sub/{DECOMPOSED}{i}.png" for i in range(8)))
    assert validation("fit") == validation("predict") == predicted
    assert len(predicted) == 3
