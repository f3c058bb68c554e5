"""Files of precomputed data: samples and index survive a round trip, and damaged files raise errors."""

import json
from pathlib import Path

import pytest
import torch

from lightning_distill.data import encoded_shards
from lightning_distill.data.encoded_shards import (
    FORMAT,
    INDEX,
    NULL,
    EncodedIndex,
    EncodedSample,
    EncodedShard,
    ShardReader,
    read_entry,
    write_atomically,
    write_samples,
)
from lightning_distill.errors import ConfigurationError


def sample(number: int, size: tuple[int, int] | None = (4, 4)) -> EncodedSample:
    condition = {
        "embeds": torch.randn(3, 5),
        "half": torch.randn(2).to(torch.bfloat16),
        "mask": torch.tensor([True, number % 2 == 0]),
        "length": torch.tensor(number),
    }
    return EncodedSample(f"prompt {number} ü", None if size is None else torch.randn(16, *size), condition)


def assert_equal(found: EncodedSample, expected: EncodedSample) -> None:
    assert found.prompt == expected.prompt
    pairs = [(found.condition[name], value) for name, value in expected.condition.items()]
    if expected.latents is None:
        assert found.latents is None
    else:
        pairs.append((found.latents, expected.latents))
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert list(found.condition) == list(expected.condition)


@pytest.mark.parametrize("sizes", [[(4, 4)] * 5, [(4, 4), (2, 8), (4, 4), (8, 2), (2, 8)], [None] * 5])
def test_sample_round_trip_is_bit_equal(tmp_path: Path, sizes: list[tuple[int, int] | None]) -> None:
    samples = [sample(i, size) for i, size in enumerate(sizes)]
    write_samples(tmp_path / "a.safetensors", samples, torch.float32)
    reader = ShardReader(tmp_path)
    assert reader.prompts("a.safetensors") == [each.prompt for each in samples]
    for row in (3, 0, 4, 1, 2):
        assert_equal(reader.read("a.safetensors", row), samples[row])


def test_bfloat16_storage_halves_the_file_and_restores_the_dtype(tmp_path: Path) -> None:
    samples = [sample(i, (16, 16)) for i in range(8)]
    _, full = write_samples(tmp_path / "a.safetensors", samples, torch.float32)
    _, half = write_samples(tmp_path / "b.safetensors", samples, torch.bfloat16)
    assert half < 0.55 * full
    found = ShardReader(tmp_path).read("b.safetensors", 2)
    assert found.latents.dtype == found.condition["embeds"].dtype == torch.float32
    assert torch.equal(found.latents, samples[2].latents.to(torch.bfloat16).float())
    for name in ("half", "mask", "length"):
        assert torch.equal(found.condition[name], samples[2].condition[name])


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    samples = [sample(i) for i in range(4)]
    assert len({write_samples(tmp_path / f"{i}.safetensors", samples, torch.float32) for i in range(5)}) == 1
    assert len({path.read_bytes() for path in tmp_path.glob("*.safetensors")}) == 1


def test_least_recently_used_files_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded_shards, "MAX_OPEN_SHARDS", 2)
    samples = [sample(i) for i in range(4)]
    for i, each in enumerate(samples):
        write_samples(tmp_path / f"{i}.safetensors", [each], torch.float32)
    reader = ShardReader(tmp_path)
    for i in (0, 1, 0, 2, 3, 0, 1):
        assert_equal(reader.read(f"{i}.safetensors", 0), samples[i])
    assert list(reader._open) == ["0.safetensors", "1.safetensors"]


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


# The index


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


def test_invalid_safetensors_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigurationError, match=r"a\.safetensors is missing or damaged"):
        ShardReader(tmp_path).read("a.safetensors", 0)


def test_missing_index_or_other_format_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.directory is .*, which has no index\.json"):
        EncodedIndex.read(tmp_path, "data.directory")
    (tmp_path / INDEX).write_text(json.dumps({"format": 99}))
    with pytest.raises(ConfigurationError, match="whose format is 99, not 1; precompute again"):
        EncodedIndex.read(tmp_path, "data.directory")
