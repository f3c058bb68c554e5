"""Files of precomputed data: samples survive a round trip, and damage is found when a sample is read."""

import contextlib
from pathlib import Path

import pytest
import torch

from lightning_distill.data import encoded_shards
from lightning_distill.data.encoded_shards import EncodedSample, ShardReader, write_samples
from lightning_distill.errors import ConfigurationError, DamagedFileError


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


# Damage


def test_every_flipped_bit_of_a_file_is_found_when_the_samples_are_read(tmp_path: Path) -> None:
    samples = [sample(i, size) for i, size in enumerate([(4, 4), (2, 8), (4, 4)])]
    path = tmp_path / "a.safetensors"
    write_samples(path, samples, torch.bfloat16)
    intact = path.read_bytes()
    first = int.from_bytes(intact[:8], "little") + 8  # of the tensors
    for position in [*range(0, first, 5), *range(first, len(intact), 37)]:
        content = bytearray(intact)
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        reader = ShardReader(tmp_path)
        with contextlib.suppress(DamagedFileError):
            found = [reader.read(path.name, row) for row in range(3)]
            for each, other in zip(found, samples, strict=True):  # only other white space, or a name without a use
                assert_equal(each, EncodedSample(other.prompt, other.latents.bfloat16().float(), lowered(other.condition)))


def lowered(condition: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Condition after storage in bfloat16."""
    return {name: value.bfloat16().to(value.dtype) if value.is_floating_point() else value for name, value in condition.items()}


def test_a_row_that_the_file_lacks_raises(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.safetensors", [sample(0)], torch.float32)
    with pytest.raises(DamagedFileError, match=r"a\.safetensors is missing or damaged"):
        ShardReader(tmp_path).read("a.safetensors", 1)


def test_invalid_safetensors_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigurationError, match=r"a\.safetensors is missing or damaged"):
        ShardReader(tmp_path).read("a.safetensors", 0)
