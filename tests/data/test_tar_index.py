"""The index of a tar file: damage of the file is an error, damage of the cached index is not."""

import bz2
import gzip
import json
import lzma
import zlib
from pathlib import Path

import pytest

from lightning_distill.data.tar_index import INDEX, load_index, scan, store_index
from lightning_distill.errors import ConfigurationError
from tests.data.tar_files import encoded_image, sparse_member, write_tar


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    members = [
        (f"{i}{suffix}", encoded_image(i) if suffix == ".png" else b"a") for i in range(6) for suffix in (".png", ".txt")
    ]
    return write_tar(tmp_path / "x.tar", [*members, ("bare.png", encoded_image(1))])


# The cache


def test_index_round_trip(shard: Path) -> None:
    assert load_index(shard, None) is None
    index = scan(shard, None)
    store_index(shard, None, index)
    found = load_index(shard, None)
    assert found is not None
    assert found.samples == index.samples
    assert str(found.skipped) == str(index.skipped) == "images without a caption: 1 (first bare.png)"
    assert str(found.remarks) == str(index.remarks)
    assert [path.name for path in shard.parent.iterdir() if path != shard] == [f"x.tar{INDEX}"]


def test_index_of_another_column_or_another_state_is_not_used(shard: Path) -> None:
    store_index(shard, None, scan(shard, None))
    assert load_index(shard, "caption") is None
    shard.write_bytes(shard.read_bytes() + bytes(512))
    assert load_index(shard, None) is None


def test_damaged_index_is_not_used(shard: Path) -> None:
    store_index(shard, None, scan(shard, None))
    path = shard.with_name(f"x.tar{INDEX}")
    intact = path.read_bytes()
    header, _, body = intact.partition(b"\n")
    damaged = [b"", b"\n", intact[:50], intact[:-1], b"[1]\n" + body, b"[" * 200_000, header + b"\n", b"\xff\xfe\n" + body]
    for position in range(0, len(intact), 7):
        content = bytearray(intact)
        content[position] ^= 1
        damaged.append(bytes(content))
    for content in damaged:
        path.write_bytes(content)
        assert load_index(shard, None) is None
    path.write_bytes(intact)
    assert load_index(shard, None) is not None


@pytest.mark.parametrize(
    "change", [{"offset": 1 << 40}, {"offset": -1}, {"size": 1 << 40}, {"size": -5}, {"size": "5"}, {"x": 1}]
)
def test_index_with_impossible_offsets_is_not_used(shard: Path, change: dict[str, object]) -> None:
    store_index(shard, None, scan(shard, None))
    path = shard.with_name(f"x.tar{INDEX}")
    header, _, body = path.read_bytes().partition(b"\n")
    content = json.loads(body)
    content["samples"][2] |= change
    body = json.dumps(content).encode()
    path.write_bytes(json.dumps(json.loads(header) | {"crc32": zlib.crc32(body)}).encode() + b"\n" + body)
    assert load_index(shard, None) is None


# Damaged tar files


def test_damaged_tar_files_are_one_line(shard: Path) -> None:
    intact = shard.read_bytes()
    flipped = bytearray(intact)
    flipped[2 * 1024 + 20] ^= 1  # in the header of a member in the middle
    for content, message in {
        b"": r"x\.tar is not an intact tar file \(empty file\); replace or remove it",
        b"not a tar file" * 100: r"x\.tar is not an intact tar file",
        intact[:700]: r"x\.tar is not an intact tar file \(unexpected end of data\)",
        intact[:2100]: r"x\.tar has a damaged header, or another tar file appended, after byte 2048",
        bytes(
            flipped
        ): r"x\.tar has a damaged header, or another tar file appended, after byte 2048; replace it, or pack it again",
        intact + intact: r"x\.tar has a damaged header, or another tar file appended, after byte 13312",
        negative_size(intact): r"x\.tar (is not an intact tar file|has a damaged header)",
        gzip.compress(intact): r"x\.tar is compressed, .* a plain tar file; unpack it with `gunzip`",
        bz2.compress(intact): r"unpack it with `bunzip2`",
        lzma.compress(intact): r"unpack it with `unxz`",
    }.items():
        shard.write_bytes(content)
        with pytest.raises(ConfigurationError, match=message) as caught:
            scan(shard, None)
        assert "\n" not in str(caught.value)


def negative_size(content: bytes) -> bytes:
    """Tar file whose third header has a negative size, which leads back to an earlier header."""
    header = bytearray(content[2048:2560])
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:2048] + bytes(header) + content[2560:]


def test_a_tar_file_without_an_end_is_read_and_noted(shard: Path) -> None:
    content = shard.read_bytes().rstrip(b"\0")
    shard.write_bytes(content + bytes(-len(content) % 512))
    index = scan(shard, None)
    assert len(index.samples) == 6
    assert str(index.remarks) == "tar files without an end mark, perhaps cut short: 1 (first )"


def test_hostile_headers_are_one_line(tmp_path: Path) -> None:
    long_name = bytearray(sparse_member("././@LongLink", 0)[:512])
    long_name[156:157] = b"L"
    long_name[148:156] = b" " * 8
    long_name[148:156] = b"%06o\0 " % sum(long_name)
    path = tmp_path / "x.tar"
    path.write_bytes((bytes(long_name) + b"a" * 512) * 3000)  # a name whose name has a name ...
    with pytest.raises(ConfigurationError, match=r"x\.tar is not an intact tar file \(.*\); replace or remove it"):
        scan(path, None)
