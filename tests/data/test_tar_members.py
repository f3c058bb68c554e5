"""Pairs of images and captions in tar files: nothing vanishes without a count."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image, features

from lightning_distill.data.tar_captions import MAX_CAPTION_BYTES
from lightning_distill.data.tar_index import scan
from tests.data.tar_files import add, encoded_image, sparse_member, write_tar

PNG = encoded_image(0)


def found(path: Path, members: list[tuple[str, bytes]], column: str | None = None) -> tuple[dict[str, str], str, str]:
    """Captions by image, and the counts of skipped and remarkable files, of a shard with these members."""
    index = scan(write_tar(path / "x.tar", members), column)
    return {sample.name: " | ".join(sample.captions) for sample in index.samples}, str(index.skipped), str(index.remarks)


# Captions


@pytest.mark.parametrize("order", [1, -1])
def test_an_explicit_column_wins_over_text_files(tmp_path: Path, order: int) -> None:
    members = [("a.png", PNG), ("a.json", b'{"caption": "plain", "better": "new"}'), ("a.txt", b"old")][::order]
    assert found(tmp_path, members) == ({"a.png": "old"}, "", "")
    assert found(tmp_path, members, "better") == ({"a.png": "new"}, "", "")
    assert found(tmp_path, members, "caption")[0] == {"a.png": "plain"}
    remark = "captions from .txt files, without 'absent' in a .json file: 1 (first a.png)"
    assert found(tmp_path, members, "absent") == ({"a.png": "old"}, "", remark)


def test_several_captions_and_several_keys(tmp_path: Path) -> None:
    members = [("a.png", PNG), ("a.json", b'{"caption": ["one", "cut \\ud83d"], "prompt": "three"}')]
    samples, _, remarks = found(tmp_path, members)
    assert samples == {"a.png": "one | cut \ufffd"}
    assert remarks.split("; ") == [
        "captions under 'caption' in a .json file that has 'prompt' too: 1 (first a.png)",
        "captions with half a character (a lone surrogate), replaced by U+FFFD: 1 (first a.png)",
    ]
    assert found(tmp_path, members, "prompt") == ({"a.png": "three"}, "", "")


def test_a_json_caption_serves_where_the_text_cannot_be_read(tmp_path: Path) -> None:
    members = [("a.png", PNG), ("a.json", b'{"text": "json"}'), ("a.txt", b"\xe9")]
    assert found(tmp_path, members)[0] == {"a.png": "json"}


def test_captions_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    captions = {
        "latin.txt": "é".encode("latin-1"),
        "deep.json": b"[" * 100_000,
        "number.json": b'{"caption": 3}',
        "long.txt": b"a" * (MAX_CAPTION_BYTES + 1),
        "blank.txt": b" \n",
        "empty.json": b'{"caption": ["", " "]}',
        "good.txt": b"a" * MAX_CAPTION_BYTES,
    }
    members = [(name, content) for name, content in captions.items()] + [(f"{Path(name).stem}.png", PNG) for name in captions]
    samples, skipped, remarks = found(tmp_path, members)
    assert list(samples) == ["good.png"]
    assert remarks == ""
    assert skipped.split("; ") == [
        "images whose caption is not UTF-8: 1 (first latin.png)",
        "images whose caption is not valid JSON: 1 (first deep.png)",
        "images whose .json file has no string under 'text' or 'caption' or 'prompt': 1 (first number.png)",
        "images whose caption is larger than 1 MiB: 1 (first long.png)",
        "images whose caption is blank: 2 (first blank.png)",
    ]


def test_blank_captions_beside_others_are_skipped_and_counted(tmp_path: Path) -> None:
    members = [("a.png", PNG), ("a.json", b'{"caption": ["one", "", "three"]}'), ("b.png", PNG), ("b.txt", b"")]
    members += [("b.json", b'{"text": "json"}')]
    samples, skipped, remarks = found(tmp_path, members)
    assert samples == {"a.png": "one | three", "b.png": "json"}
    assert (skipped, remarks) == ("", "images of whose captions some are blank, which are skipped: 1 (first a.png)")


def test_half_characters_are_replaced_and_counted(tmp_path: Path) -> None:
    samples, _, remarks = found(tmp_path, [("a.png", PNG), ("a.json", b'{"caption": "a \\ud83d b \\ud83d\\ude00"}')])
    assert samples == {"a.png": "a \ufffd b 😀"}
    assert remarks == "captions with half a character (a lone surrogate), replaced by U+FFFD: 1 (first a.png)"


# Names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("photo v1.0.jpg photo v1.0.txt photo v1.1.jpg photo v1.1.txt", {"photo v1.0.jpg": "photo v1.0.txt"}),
        ("A.PNG A.TXT a.png a.txt", {"A.PNG": "A.TXT", "a.png": "a.txt"}),
        ("x/a.png x/a.txt y/a.png y/a.txt", {"x/a.png": "x/a.txt", "y/a.png": "y/a.txt"}),
        ("x.y/a.png x.y/a.txt", {"x.y/a.png": "x.y/a.txt"}),
        (
            "0.image.png 0.caption.txt 1.image.png 1.caption.txt",
            {"0.image.png": "0.caption.txt", "1.image.png": "1.caption.txt"},
        ),
        ("0.png 0.caption.txt 1.png 1.caption.txt", {"0.png": "0.caption.txt", "1.png": "1.caption.txt"}),
        ("0.png 0.seg.png 0.txt", {"0.png": "0.txt"}),
        ("cafe\u0301.png caf\u00e9.txt a.png a.txt", {"cafe\u0301.png": "caf\u00e9.txt", "a.png": "a.txt"}),
        ("my.cat.png my.dog.txt", {}),  # neither has a partner
        ("a.0.png a.1.txt b.0.png b.1.txt", {}),
        ("x/0.image.png y/0.caption.txt x/1.image.png y/1.caption.txt", {}),
    ],
)
def test_names_that_belong_together(tmp_path: Path, names: str, expected: dict[str, str]) -> None:
    listed = names.replace("photo v", "photo_v").split()
    members = [
        (name.replace("_", " "), PNG if name[-3:].lower() != "txt" else name.replace("_", " ").encode()) for name in listed
    ]
    samples, skipped, _ = found(tmp_path, members)
    assert expected.items() <= samples.items()
    assert len(samples) == (len(expected) if "photo" not in names else 2)
    assert bool(skipped) == (2 * len(samples) < len(listed))


def test_what_has_no_partner_is_counted(tmp_path: Path) -> None:
    members = [("a.png", PNG), ("b.txt", b"b"), ("c.txt", b"c"), ("c.heic", b"c"), ("d.png", PNG), ("d.txt", b"d")]
    members += [("d.webp", encoded_image(0, kind="WEBP")), ("d.cls", b"7"), ("e.png", b"torn"), ("e.txt", b"e"), ("f.png", b"")]
    samples, skipped, _ = found(tmp_path, members)
    assert samples == {"d.png": "d"}
    assert skipped.split("; ") == [
        "further images with the name of another: 1 (first d.webp)",
        "images that are unreadable: 2 (first e.png)",
        "images without a caption: 1 (first a.png)",
        "captions without an image: 2 (first b.txt)",
    ]
    assert "first c.txt beside c.heic" in found(tmp_path, [m for m in members if m[0] != "b.txt"])[1]


def test_the_last_member_of_a_name_counts(tmp_path: Path) -> None:
    members = [("a.png", PNG), ("a.txt", b"old"), ("a.png", encoded_image(0, (4, 5))), ("a.txt", b"new")]
    index = scan(write_tar(tmp_path / "x.tar", members), None)
    (sample,) = index.samples
    assert (sample.captions, sample.height, sample.width) == (("new",), 5, 4)
    assert str(index.skipped) == "files that a later one of the same name replaces: 2 (first a.png)"
    samples, skipped, _ = found(tmp_path, [*members, ("a.txt", b"")])
    assert not samples
    assert "images whose caption is blank: 1 (first a.png)" in skipped


@pytest.mark.parametrize("kind", ["AVIF", "WEBP", "GIF", "BMP", "TIFF", "JPEG"])
def test_formats(tmp_path: Path, kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this build of Pillow has no AVIF")
    file = io.BytesIO()
    Image.new("RGB", (9, 8)).save(file, kind)
    (sample,) = scan(write_tar(tmp_path / "x.tar", [(f"a.{kind}", file.getvalue()), ("a.txt", b"a")]), None).samples
    assert (sample.height, sample.width) == (8, 9)


# Hostile members


@pytest.mark.parametrize("folder", ["../..", "/etc", "a/../.."])
def test_names_that_lead_out_are_skipped(tmp_path: Path, folder: str) -> None:
    members = [("a.png", PNG), ("a.txt", b"a"), (f"{folder}/b.png", PNG), (f"{folder}/b.txt", b"b")]
    samples, skipped, _ = found(tmp_path, members)
    assert samples == {"a.png": "a"}
    assert skipped == f"files whose names lead out of the tar file: 2 (first {folder}/b.png)"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_not_followed(tmp_path: Path, kind: bytes) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a.png", PNG)
        add(archive, "a.txt", b"a")
        add(archive, "b.png", PNG)
        for name, target in (("b.txt", str(secret)), ("c.png", "a.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
        add(archive, "c.txt", b"c")
    index = scan(tmp_path / "x.tar", None)
    assert [sample.captions for sample in index.samples] == [("a",)]
    assert str(index.skipped) == (
        "images that are of a special type (link, device or sparse): 1 (first c.png); images whose caption is of a special "
        "type (link, device or sparse): 1 (first b.png)"
    )


def test_sparse_members_are_not_unpacked(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.png", PNG), ("a.txt", b"a"), ("b.png", PNG)])
    content = path.read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512)
    path.write_bytes(content + sparse_member("b.txt", 1 << 40) + sparse_member("c.png", 1 << 40) + bytes(1024))
    index = scan(path, None)
    assert [sample.captions for sample in index.samples] == [("a",)]
    assert "images whose caption is of a special type (link, device or sparse): 1 (first b.png)" in str(index.skipped)
    assert "images that are of a special type (link, device or sparse): 1 (first c.png)" in str(index.skipped)
