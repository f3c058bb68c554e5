import json

import pytest

from lightning_distill.data.tar_captions import CaptionError, read_json, read_text, replace_lone_surrogates


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_texts_with_and_without_a_byte_order_mark(encoding: str) -> None:
    assert read_text("ein Hügel 😀\r\n".encode(encoding)) == "ein Hügel 😀"
    assert read_json(json.dumps({"caption": "ein Hügel"}, ensure_ascii=False).encode(encoding), None) == "ein Hügel"


def test_big_endian_texts() -> None:
    assert read_text(b"\xfe\xff" + "Hügel".encode("utf-16-be")) == "Hügel"
    assert read_text(b"\x00\x00\xfe\xff" + "Hügel".encode("utf-32-be")) == "Hügel"


@pytest.mark.parametrize("content", ["Hügel".encode("latin-1"), "broad".encode("utf-16-le"), b"\xff\xfea", b"\xed\xa0\xbd"])
def test_other_encodings_raise(content: bytes) -> None:
    with pytest.raises(CaptionError, match="images whose caption is not UTF-8"):
        read_text(content)


@pytest.mark.parametrize(
    ("entry", "column", "expected"),
    [
        ({"caption": "a", "text": "b"}, None, "a"),
        ({"prompt": "c", "text": "b"}, None, "b"),
        ({"prompt": "c", "text": 5}, None, "c"),
        ({"caption": "a", "text": "b"}, "text", "b"),
        ({"caption": ""}, "caption", ""),
    ],
)
def test_keys_of_json_captions(entry: dict[str, object], column: str | None, expected: str) -> None:
    assert read_json(json.dumps(entry).encode(), column) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xe9", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b"[]", "no string under 'caption' or 'text' or 'prompt'"),
        (b'{"caption": 3}', "no string under 'caption' or"),
    ],
)
def test_json_files_without_a_caption_raise(content: bytes, message: str) -> None:
    with pytest.raises(CaptionError, match=message):
        read_json(content, None)


def test_lone_surrogates_are_replaced() -> None:
    assert replace_lone_surrogates("a \ud83d b") == "a \ufffd b"
    assert replace_lone_surrogates("cut \ud83d") == "cut \ufffd"
    assert replace_lone_surrogates("whole 😀 ü") == "whole 😀 ü"
