"""Files of weights: the choice of a variant, single and sharded files, and what incomplete files raise."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_distill.sharding.weight_files import WeightFiles, WeightFilesError, choose_variant

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with two files of weights and their index."""
    save_file({"a": torch.ones(2, 3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(4)}, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize(
    ("names", "preferred", "chosen"),
    [
        (["model.safetensors"], None, None),
        (["model.safetensors", "model.fp16.safetensors"], None, None),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", "fp16"),
        (["model.fp16.safetensors"], None, "fp16"),
        (["model.safetensors"], "fp16", None),
        (["diffusion_pytorch_model.fp16.safetensors"], "bf16", "fp16"),
        (["model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors"], None, "fp16"),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "bf16", "bf16"),
    ],
)
def test_variants_are_chosen(names: list[str], preferred: str | None, chosen: str | None) -> None:
    assert choose_variant(names, preferred) == chosen


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.fp16.safetensors", "model.bf16.safetensors"], "has the variants bf16, fp16; set variant to one of them"),
        (["config.json", "pytorch_model.bin"], r"has pytorch_model\.bin and no safetensors file.*convert it to safetensors"),
        (["config.json"], "has no weights"),
        ([], "has no weights"),
    ],
)
def test_no_choice_raises(names: list[str], message: str) -> None:
    with pytest.raises(WeightFilesError, match=message):
        choose_variant(names)


def test_shapes_of_sharded_files(sharded: Path) -> None:
    assert WeightFiles.of_component(sharded).shapes() == {"a": (2, 3), "b": (4,)}


@pytest.mark.parametrize(("stem", "expected"), [("model", (1,)), ("diffusion_pytorch_model", (2, 3))])
def test_precedence_is_that_of_the_library(stem: str, expected: tuple[int, ...], sharded: Path) -> None:
    save_file({"a": torch.ones(1)}, sharded / f"{stem}.safetensors")
    (sharded / INDEX).rename(sharded / f"{stem}.safetensors.index.json")
    assert WeightFiles.of_component(sharded).shapes()["a"] == expected


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def empty(file: Path) -> None:
    file.write_bytes(b"")


def point(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n")


def rename_tensor(file: Path) -> None:
    save_file({"c": torch.ones(4)}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"lacks model-00002-of-00002\.safetensors"),
        (empty, r"has an empty model-00002-of-00002\.safetensors"),
        (cut, r"has an incomplete or damaged model-00002-of-00002\.safetensors"),
        (lengthen, r"has an incomplete or damaged model-00002-of-00002\.safetensors"),
        (point, r"git-lfs pointer in place of model-00002-of-00002\.safetensors; run `git lfs pull`"),
        (rename_tensor, r"has model-00002-of-00002\.safetensors without b, which its index names"),
    ],
)
def test_damaged_files_raise(damage: Callable[[Path], None], message: str, sharded: Path) -> None:
    damage(sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(WeightFilesError, match=message) as caught:
        WeightFiles.of_component(sharded).shapes()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}', '{"x": 1}']
)
def test_damaged_indices_raise(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(WeightFilesError, match=r"model\.safetensors\.index\.json that"):
        WeightFiles.of_component(sharded)
