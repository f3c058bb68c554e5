"""The index of precomputed data: it survives a round trip, and damage and impossible values raise one line."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_distill.data import encoded_index
from lightning_distill.data.encoded_index import FORMAT, INDEX, EncodedIndex, EncodedShard, read_entry
from lightning_distill.data.encoded_shards import NULL, write_samples
from lightning_distill.errors import ConfigurationError
from tests.data.test_encoded_shards import sample


@pytest.fixture
def written(tmp_path: Path) -> EncodedIndex:
    null = write_samples(tmp_path / NULL, [sample(0, None)], torch.float32)
    file = "train-00000.safetensors"
    sha256, size = write_samples(tmp_path / file, [sample(i) for i in range(3)], torch.float32)
    shard = EncodedShard(file, sha256, size, 8, 11, [(9, "torn")], [0, 1, 0], [(32, 32), (16, 64)])
    index = EncodedIndex({"adapter.pretrained": "x"}, {"train": [shard], "validation": []}, null)
    index.write(tmp_path)
    return index


def test_index_round_trip(tmp_path: Path, written: EncodedIndex) -> None:
    found = EncodedIndex.read(tmp_path, "data.directory")
    assert found == written
    assert found.complete
    assert found.has_images
    (shard,) = found.shards["train"]
    assert shard.sample_indices == [8, 10, 11]
    content = json.loads((tmp_path / INDEX).read_text())
    assert content["format"] == FORMAT
    assert content["image_sizes"] == [[16, 64], [32, 32]]
    assert content["samples"] == {"train": 3, "validation": 0}
    assert content["broken"] == {"train": 1, "validation": 0}
    assert read_entry(content["shards"]["train"][0]) == shard


def test_incomplete_index(tmp_path: Path) -> None:
    EncodedIndex({"a": 1}).write(tmp_path)
    found = EncodedIndex.read(tmp_path, "out")
    assert found.settings == {"a": 1}
    assert not found.complete


@pytest.mark.parametrize("file", [NULL, "train-00000.safetensors"])
def test_check_files_raises_for_damage(tmp_path: Path, written: EncodedIndex, file: str) -> None:
    path = tmp_path / file
    intact = path.read_bytes()
    written.check_files(tmp_path, contents=True)
    flipped = bytearray(intact)
    flipped[-3] ^= 1
    path.write_bytes(flipped)
    written.check_files(tmp_path, contents=False)
    with pytest.raises(ConfigurationError, match=f"{file} is missing or damaged; delete it and run the same `precompute`"):
        written.check_files(tmp_path, contents=True)
    path.write_bytes(intact[:-1])
    with pytest.raises(ConfigurationError, match="damaged"):
        written.check_files(tmp_path, contents=False)
    path.unlink()
    with pytest.raises(ConfigurationError, match="missing"):
        written.check_files(tmp_path, contents=False)


def test_missing_index_or_other_format_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.directory is .*, which has no index\.json"):
        EncodedIndex.read(tmp_path, "data.directory")
    (tmp_path / INDEX).write_text(json.dumps({"format": 99}))
    with pytest.raises(ConfigurationError, match="whose format is 99, not 2; precompute again"):
        EncodedIndex.read(tmp_path, "data.directory")


def test_all_damaged_files_are_counted(tmp_path: Path, written: EncodedIndex) -> None:
    (tmp_path / NULL).unlink()
    (tmp_path / "train-00000.safetensors").write_bytes(b"")
    with pytest.raises(
        ConfigurationError, match=rf"{NULL} is missing or damaged, as are 1 other files of its directory; delete"
    ):
        written.check_files(tmp_path, contents=True)


def test_small_data_is_compared_with_its_digests_by_default(
    tmp_path: Path, written: EncodedIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"train-00000\.safetensors is missing or damaged"):
        written.check_files(tmp_path, contents=None)
    monkeypatch.setattr(encoded_index, "VERIFIED_BYTES", len(content))
    written.check_files(tmp_path, contents=None)


def test_every_changed_byte_of_the_index_is_one_line(tmp_path: Path, written: EncodedIndex) -> None:
    path = tmp_path / INDEX
    intact = path.read_bytes()
    for position in range(0, len(intact) - 1, 3):
        content = bytearray(intact)
        content[position] ^= 1 << position % 7
        path.write_bytes(content)
        with contextlib.suppress(ConfigurationError):
            assert EncodedIndex.read(tmp_path, "data.directory") == written  # only other white space


@pytest.mark.parametrize("content", [b"", b'{"format": 2', b"[1]", b"null", b"\xff\xfe", b"[" * 200_000, b'{"format": 2}'])
def test_a_damaged_index_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"data\.directory is .*, whose index\.json is damaged \(.*another directory$"):
        EncodedIndex.read(tmp_path, "data.directory")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "../train-00000.safetensors"}, "it names the file '../train-00000.safetensors'"),
        ({"file": "/train-00000.safetensors"}, "it names the file '/train"),
        ({"file": "train-00000.ckpt"}, "it names the file 'train-00000.ckpt'"),
        ({"last": 10**9}, "it counts 999999992 samples in the"),
        ({"last": 10**9, "size": 10**12}, "it has wrong counts"),
        ({"last": 6}, "it counts -2 samples"),
        ({"first": -1}, "it counts 12 samples"),
        ({"broken": [[9, "torn"], [9, "torn"]]}, "it has wrong counts"),
        ({"broken": [[12, "torn"]]}, "it has wrong counts"),
        ({"broken": [[9]]}, "not enough values"),
        ({"buckets": [0, 1]}, "it has wrong counts"),
        ({"first": "8"}, ""),
    ],
)
def test_impossible_entries_are_one_line(
    tmp_path: Path, written: EncodedIndex, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / INDEX
    content = json.loads(path.read_text())
    content["shards"]["train"][0] |= changes
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match="it is not what was written"):
        EncodedIndex.read(tmp_path, "data.directory")
    monkeypatch.setattr(encoded_index, "_digest", lambda content: "1")
    path.write_text(json.dumps(content | {"sha256": "1"}))
    with pytest.raises(ConfigurationError, match=rf"whose index\.json is damaged \(.*{message}"):
        EncodedIndex.read(tmp_path, "data.directory")
