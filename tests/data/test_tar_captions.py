import json

import pytest

from lightning_distill.data.tar_captions import CaptionError, read_json, read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_with_and_without_a_byte_order_mark(encoding: str) -> None:
    assert read_text("ein Hügel 😀\r\n".encode(encoding)) == "ein Hügel 😀"
    content = json.dumps({"caption": "ein Hügel"}, ensure_ascii=False).encode(encoding)
    assert read_json(content, None) == (("ein Hügel",), ["caption"])


def test_big_endian_texts() -> None:
    assert read_text(b"\xfe\xff" + "Hügel".encode("utf-16-be")) == "Hügel"


@pytest.mark.parametrize(
    "content", ["Hügel".encode("latin-1"), "broad".encode("utf-16-le"), b"\xff\xfea", b"\xed\xa0\xbd", "a".encode("utf-32")]
)
def test_other_encodings_raise(content: bytes) -> None:
    with pytest.raises(CaptionError, match="images whose caption is not UTF-8"):
        read_text(content)


@pytest.mark.parametrize(
    ("entry", "column", "expected"),
    [
        ({"caption": "a", "text": "b"}, None, ("b",)),
        ({"prompt": "c", "caption": "b"}, None, ("b",)),
        ({"prompt": "c", "text": 5}, None, ("c",)),
        ({"prompt": "c", "text": []}, None, ("c",)),
        ({"caption": "a", "text": "b"}, "caption", ("a",)),
        ({"caption": ["a", "b"]}, "caption", ("a", "b")),
        ({"caption": "a", "text": " "}, None, ("a",)),
        ({"caption": ["a", ""]}, "caption", ("a", "")),
    ],
)
def test_keys_of_json_captions(entry: dict[str, object], column: str | None, expected: tuple[str, ...]) -> None:
    assert read_json(json.dumps(entry).encode(), column)[0] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xe9", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b"[]", "no string under 'text' or 'caption' or 'prompt'"),
        (b'{"caption": ["a", 3]}', "no string under 'text' or"),
        (b'{"caption": 3}', "no string under 'text' or"),
        (b'{"caption": ["", " "], "text": ""}', "images whose caption is blank"),
    ],
)
def test_json_files_without_a_caption_raise(content: bytes, message: str) -> None:
    with pytest.raises(CaptionError, match=message):
        read_json(content, None)
