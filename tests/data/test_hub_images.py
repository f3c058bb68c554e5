"""Data sets of Hugging Face: same batches as from tar files, and one line for damaged or unsuitable ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_distill.data.hub_images import HubImages
from lightning_distill.errors import ConfigurationError
from tests.data.tar_files import encoded_image
from tests.data.test_image_text import SHAPES, set_up


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the images of `folder` to two Parquet files, one caption missing, one image broken; and a validation folder."""
    datasets = pytest.importorskip("datasets", reason='needs datasets: pip install -c constraints.txt -e ".[data]"')
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for part in range(2):
        rows = [{"bytes": encoded_image(5 * i, SHAPES[i % 3]), "path": None} for i in range(24 * part, 24 * part + 24)]
        captions = [f"image {i}" for i in range(24 * part, 24 * part + 24)]
        if part:
            rows[-1]["bytes"], captions[-2] = b"not an image", None
            rows[-3] = None
        columns = {"image": rows, "caption": captions, "id": list(range(24))}
        features = datasets.Features(
            {"image": datasets.Image(), "caption": datasets.Value("string"), "id": datasets.Value("int64")}
        )
        datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / f"{part}.parquet")
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.png").write_bytes(encoded_image(5 * i, (32, 32)))
    lines = [json.dumps({"file_name": f"{i}.png", "caption": f"image {i}"}) for i in range(3)]
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_hugging_face_data_sets(parquet: Path) -> None:
    sources = {"source": str(parquet / "*.parquet"), "validation_source": str(parquet / "images")}
    data = set_up(parquet, batch_size=2, **sources)
    seen = []
    for batch in data.train_dataloader():
        assert len({tuple(image.shape) for image in batch["image"]}) == 1
        for prompt, image in zip(batch["prompt"], batch["image"], strict=True):
            assert torch.allclose(image, torch.tensor(int(prompt.split()[1]) * 5 / 127.5 - 1), atol=1e-5)
            seen.append(prompt)
    assert set(seen) <= {f"image {i}" for i in range(45)}
    assert 42 <= len(seen) == len(set(seen))
    (batch,) = set_up(parquet, "validate", **sources).val_dataloader()
    assert batch["prompt"] == ["image 0", "image 1", "image 2"]


def test_location_is_the_row_number_of_the_source(parquet: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"bytes": content, "path": None} for content in (b"not an image", encoded_image(1, (32, 32)))]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    file = str(parquet / "broken.parquet")
    datasets.Dataset.from_dict({"image": rows, "caption": ["one", "two"]}, features).to_parquet(file)
    assert HubImages(file, "train", "image", "caption", "data.source").location(0) == f"row 1 of {file}"


def write_parquet(path: Path, columns: dict[str, list[Any]], image: str = "Image") -> str:
    """Write a Parquet file of these columns."""
    datasets = pytest.importorskip("datasets")
    kinds = {int: "int64", float: "float64", str: "string"}
    features = {name: datasets.Value(kinds.get(type(values[0]), "string")) for name, values in columns.items()}
    if image == "Image":
        features["image"] = datasets.Image()
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(path)
    return str(path)


@pytest.mark.usefixtures("parquet")
@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([10, 0, None], [(10, 7)]),  # 0 and null are counted
        ([10.0, 10.0, 10.0], [(9, 8)] * 3),  # read from the headers
        (["10", "10", "10"], [(9, 8)] * 3),
    ],
)
def test_columns_of_sizes_are_used_if_they_have_integers(
    heights: list[Any], expected: list[tuple[int, int]], tmp_path: Path
) -> None:
    rows = [{"bytes": encoded_image(1, (8, 9)), "path": None}] * 3
    columns = {"image": rows, "caption": ["a", "b", "c"], "height": heights, "width": [type(heights[0])(7)] * 3}
    source = HubImages(write_parquet(tmp_path / "sizes.parquet", columns), "train", "image", "caption", "data.source")
    assert source.sizes == expected
    assert str(source.skipped) == ("images that are unreadable: 2 (first row 1)" if len(expected) == 1 else "")


@pytest.mark.usefixtures("parquet")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", r"whose split 'train' cannot be loaded \(Parquet magic bytes not found"),
        ("columns", r"whose split 'train' cannot be loaded \(Couldn't cast"),
        (
            "numbers",
            r"data\.image_column is 'image', whose values are no images but Value\('int64'\); choose another one of image, cap",
        ),
        (
            "captions",
            r"with a caption under 'caption', a text or a list of texts \(images without a caption: 2 \(first row 0\)\)",
        ),
    ],
)
def test_damaged_data_sets_raise_one_line(damage: str, message: str, tmp_path: Path) -> None:
    rows = [{"bytes": encoded_image(1, (8, 9)), "path": None}] * 2
    file = write_parquet(tmp_path / "a.parquet", {"image": rows, "caption": ["a", "b"]})
    if damage == "cut":
        Path(file).write_bytes(Path(file).read_bytes()[:-9])
    elif damage == "columns":
        write_parquet(tmp_path / "b.parquet", {"image": rows, "caption": ["a", "b"], "more": [1, 2]})
        file = str(tmp_path / "*.parquet")
    elif damage == "numbers":
        write_parquet(tmp_path / "a.parquet", {"image": [1, 2], "caption": ["a", "b"]}, image="int64")
    else:
        write_parquet(tmp_path / "a.parquet", {"image": rows, "caption": [1, 2]})
    with pytest.raises(ConfigurationError, match=message) as caught:
        HubImages(file, "train", "image", None, "data.source")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "absent/*.parquet"}, r"data\.source is 'absent/\*\.parquet', which matches no file"),
        ({"source": "absent"}, r"data\.source is 'absent', whose split 'train' cannot be loaded"),
        ({"source": ["a", "b"]}, r"data\.source is 'a, b'; give one Hub id or directory, or tar or \.parquet files"),
        ({"source": ""}, r"data\.source is ''; give one Hub id"),
        ({"caption_column": "text"}, r"data\.caption_column is 'text', but .* has the columns caption, id; choose"),
        ({"image_column": "png"}, r"data\.image_column is 'png'"),
        ({"validation_source": None}, r"whose split 'validation' cannot be loaded"),
    ],
)
def test_invalid_data_sets_raise_one_line(settings: dict[str, Any], message: str, parquet: Path) -> None:
    sources = {"source": str(parquet / "*.parquet"), "validation_source": str(parquet / "*.parquet")}
    with pytest.raises(ConfigurationError, match=message) as caught:
        set_up(parquet, **sources | settings)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("parquet")
def test_lists_of_captions_and_several_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {
        "image": [{"bytes": encoded_image(1), "path": None}] * 5,
        "text": [["a", "b"], ["c"], [], ["", " "], ["d", ""]],
        "prompt": list("vwxyz"),
    }
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.List(datasets.Value("string")), "prompt": datasets.Value("string")}
    )
    file = str(tmp_path / "lists.parquet")
    datasets.Dataset.from_dict(columns, features).to_parquet(file)
    with pytest.warns(
        UserWarning, match=r"data\.source has the columns text, prompt: captions are read from 'text'; set data\.capt"
    ):
        source = HubImages(file, "train", "image", None, "data.source")
    assert [source.captions(index) for index in range(len(source))] == [("a", "b"), ("c",), ("d",)]
    assert str(source.skipped) == "images without a caption: 1 (first row 2); images whose caption is blank: 1 (first row 3)"
    assert str(source.remarks) == "images of whose captions some are blank, which are skipped: 1 (first row 4)"
