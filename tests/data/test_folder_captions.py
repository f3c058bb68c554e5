from pathlib import Path

import pytest
from PIL import Image

from lightning_distill.data import ImageFolder
from lightning_distill.data.caption_tables import ENDINGS
from lightning_distill.data.folder_captions import read_captions
from lightning_distill.data.folder_files import find_files
from lightning_distill.errors import ConfigurationError
from tests.data.tables import write_table

ROWS = [{"file_name": f"{i}.png", "text": f"image {i}"} for i in range(3)]


def write_images(directory: Path, *names: str) -> Path:
    for name in names or ("0.png", "1.png", "2.png"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(directory / name, "PNG")
    return directory


def captions(directory: Path, column: str | None = None) -> dict[str, tuple[str, ...]]:
    samples = find_files(directory, read_captions(directory, "data.directory", column), "data.directory")
    return {sample.file_name: sample.captions for sample in samples}


# Tables


@pytest.mark.parametrize("name", [*(f"metadata{ending}" for ending in ENDINGS), "Metadata.CSV"])
def test_tables(name: str, tmp_path: Path) -> None:
    write_table(write_images(tmp_path) / name, ROWS)
    (tmp_path / "0.txt").write_text("a table has priority")
    assert captions(tmp_path) == {"0.png": ("image 0",), "1.png": ("image 1",), "2.png": ("image 2",)}


def test_column_of_captions(tmp_path: Path) -> None:
    write_table(write_images(tmp_path) / "metadata.csv", [{"words": "b", "prompt": "a", **row} for row in ROWS])
    assert captions(tmp_path, "words")["0.png"] == ("b",)
    with pytest.warns(UserWarning, match="captions are read from 'text'"):
        assert captions(tmp_path)["0.png"] == ("image 0",)


def test_two_tables_raise(tmp_path: Path) -> None:
    for name in ("metadata.csv", "metadata.jsonl"):
        write_table(tmp_path / name, ROWS)
    with pytest.raises(ConfigurationError, match=r"which has metadata\.csv, metadata\.jsonl; keep one of them"):
        captions(tmp_path)


@pytest.mark.parametrize("value", [None, 3, ""])
def test_rows_without_file_name_raise(value: object, tmp_path: Path) -> None:
    write_table(tmp_path / "metadata.jsonl", [*ROWS, {"file_name": value, "text": "a"}])
    with pytest.raises(ConfigurationError, match=r'line 4 of .*metadata\.jsonl has no string under "file_name"'):
        captions(tmp_path)


def test_half_surrogate_pairs_are_replaced(tmp_path: Path) -> None:
    write_table(write_images(tmp_path) / "metadata.jsonl", [*ROWS[:2], {"file_name": "2.png", "text": "cut \ud83d"}])
    with pytest.warns(UserWarning, match=r"1 captions of .*metadata\.jsonl have half .* first in line 3"):
        assert captions(tmp_path)["2.png"] == ("cut \ufffd",)


@pytest.mark.parametrize("name", [f"metadata{ending}" for ending in ENDINGS])
def test_blank_captions_are_counted(name: str, tmp_path: Path) -> None:
    write_table(write_images(tmp_path) / name, [*ROWS[:2], {"file_name": "2.png", "text": " "}])
    with pytest.warns(UserWarning, match=rf"^skips 1 blank captions of .*{name}, first in (line 4|line 3|entry 3|row 3)$"):
        assert set(captions(tmp_path)) == {"0.png", "1.png"}


def test_tables_with_blank_captions_only_raise(tmp_path: Path) -> None:
    write_table(write_images(tmp_path) / "metadata.csv", [{**row, "text": ""} for row in ROWS])
    with (
        pytest.warns(UserWarning, match="skips 3 blank captions"),
        pytest.raises(ConfigurationError, match=r"metadata\.csv of data\.directory has no captions; write a line with one"),
    ):
        captions(tmp_path)


# Text files beside the images


def test_text_files(tmp_path: Path) -> None:
    write_images(tmp_path, "0.png", "b/1.JPG", "b/c/2.webp", ".hidden/3.png", "._0.png")
    for name, text in (("0.TXT", b"\xef\xbb\xbfimage 0\r\n"), ("b/1.txt", "é".encode("utf-16")), ("b/c/2.txt", b"two\nlines")):
        (tmp_path / name).write_bytes(text)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert captions(tmp_path) == {"0.png": ("image 0",), "b/1.JPG": ("é",), "b/c/2.webp": ("two\nlines",)}


def test_images_without_text_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"{i}.png" for i in range(6)))
    (tmp_path / "4.txt").write_text("a")
    with pytest.warns(UserWarning, match=r"^skips 5 images without a \.txt .*: '0\.png', '1\.png', '2\.png', \.\.\.$"):
        assert captions(tmp_path) == {"4.png": ("a",)}


def test_text_files_without_image_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path, "0.png", "1.heic")
    for name in ("0.txt", "1.txt", "README.txt"):
        (tmp_path / name).write_text("a")
    with pytest.warns(UserWarning, match=r"^skips 2 \.txt files without an image \(\.png, .*: '1\.txt', 'README\.txt'$"):
        assert captions(tmp_path) == {"0.png": ("a",)}


def test_blank_text_files_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path)
    for name, text in (("0.txt", ""), ("1.txt", "a"), ("2.txt", " \n")):
        (tmp_path / name).write_text(text)
    with pytest.warns(UserWarning, match=r"^skips 2 images with a blank \.txt beside them .*: '0\.png', '2\.png'$") as caught:
        assert captions(tmp_path) == {"1.png": ("a",)}
    assert len(caught) == 1
    (tmp_path / "1.txt").write_text("")
    with pytest.raises(
        ConfigurationError, match=r"whose \.txt files beside images are all blank: 3, first beside '0\.png'; write"
    ):
        captions(tmp_path)


def test_text_files_in_another_normal_form(tmp_path: Path) -> None:
    """The systems of the image and of the text write an accent differently."""
    write_images(tmp_path, "cafe\u0301.png", "caf\u00e9_2.png")
    (tmp_path / "caf\u00e9.txt").write_text("one")
    (tmp_path / "cafe\u0301_2.txt").write_text("two")
    assert captions(tmp_path) == {"cafe\u0301.png": ("one",), "caf\u00e9_2.png": ("two",)}


def test_column_of_captions_without_table_raises(tmp_path: Path) -> None:
    (write_images(tmp_path) / "0.txt").write_text("a")
    with pytest.raises(ConfigurationError, match=r"data\.caption_column is 'words', but data\.directory is .* has no table"):
        captions(tmp_path, "words")


def test_directories_without_captions_raise(tmp_path: Path) -> None:
    write_table(write_images(tmp_path / "train") / "metadata.csv", ROWS)
    with pytest.raises(
        ConfigurationError, match=r"no \.txt beside its 3 images; .*; train/metadata\.csv is in a sub-directory: set "
    ):
        captions(tmp_path)
    (tmp_path / "train" / "0.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigurationError, match=r"train/0\.txt is not UTF-8"):
        captions(tmp_path)


def test_image_folder_reads_text_files_beneath_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "images", "0.png", "sub/1.png", "sub/2.png")
    for name in ("0", "sub/1", "sub/2"):
        (tmp_path / "images" / f"{name}.txt").write_text(f"image {name}")
    monkeypatch.setenv("HOME", str(tmp_path))
    data = ImageFolder("~/images", num_workers=0, height=8, width=8)
    data.setup("fit")
    samples = [
        prompt for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader for prompt in batch["prompt"]
    ]
    assert sorted(samples) == ["image 0", "image sub/1", "image sub/2"]
