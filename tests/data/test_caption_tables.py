import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lightning_distill.data.caption_tables import ENDINGS, CaptionColumn, Row, decode_text, read_lines, read_rows
from lightning_distill.errors import ConfigurationError
from tests.data.tables import write_table

ROWS = [
    {"file_name": "0.png", "text": 'a "red", round\nthing'},
    {"file_name": "1.png", "text": "日本語"},
    {"file_name": "2.png", "text": ""},
]


@pytest.mark.parametrize("ending", [*ENDINGS, ".JSONL", ".Csv"])
def test_rows_of_all_formats(ending: str, tmp_path: Path) -> None:
    assert [row.values for row in read_rows(write_table(tmp_path / f"table{ending}", ROWS))] == ROWS


def test_places(tmp_path: Path) -> None:
    def places(name: str) -> list[str]:
        return [row.place for row in read_rows(write_table(tmp_path / name, ROWS))]

    assert places("table.csv") == ["line 3", "line 4", "line 5"]  # the last line of each row
    assert places("table.json") == ["entry 1", "entry 2", "entry 3"]
    assert places("table.parquet") == ["row 1", "row 2", "row 3"]
    (tmp_path / "gap.jsonl").write_bytes(b'{"a": 1}\r\n\r\n  \r\n{"a": 2}')
    assert list(read_rows(tmp_path / "gap.jsonl")) == [Row("line 1", {"a": 1}), Row("line 4", {"a": 2})]


def test_json_lines_may_be_named_json(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text('{"a": 1}\n{"a": 2}\n')
    assert [row.values["a"] for row in read_rows(tmp_path / "table.json")] == [1, 2]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_byte_order_marks(encoding: str, tmp_path: Path) -> None:
    text = "\ufeffé\r\nb\r\n" if encoding == "utf-16-le" else "é\r\nb\r\n"
    (tmp_path / "lines.txt").write_bytes(text.encode(encoding))
    assert [row.values.rstrip() for row in read_lines(tmp_path / "lines.txt")] == ["é", "b"]
    assert decode_text(text.encode(encoding)) == "é\r\nb\r\n"
    (tmp_path / "table.csv").write_bytes(text.replace("é", "text").encode(encoding))
    assert [row.values for row in read_rows(tmp_path / "table.csv")] == [{"text": "b"}]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(end: str, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes(end.join(["one", "two", "", "three"]).encode())
    assert [(row.place, row.values.rstrip()) for row in read_lines(tmp_path / "lines.txt")] == [
        ("line 1", "one"),
        ("line 2", "two"),
        ("line 3", ""),
        ("line 4", "three"),
    ]
    (tmp_path / "table.csv").write_bytes(end.join(["file_name,text", "a.png,a", f'b.png,"b{end}c"', ""]).encode())
    assert list(read_rows(tmp_path / "table.csv")) == [
        Row("line 2", {"file_name": "a.png", "text": "a"}),
        Row("line 4", {"file_name": "b.png", "text": f"b{end}c"}),
    ]


def test_blanks_around_delimiters_of_csv_files_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text('file_name , text,,\na.png, "a cat, asleep",,\n')
    (row,) = read_rows(tmp_path / "table.csv")
    assert (row.values["file_name"], row.values["text"]) == ("a.png", "a cat, asleep")


def test_columns_of_one_name_raise(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("file_name,text, text\na.png,a,b\n")
    arrays = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(pyarrow.Table.from_arrays(arrays, names=["text", "text"]), tmp_path / "table.parquet")
    for name in ("table.csv", "table.parquet"):
        with pytest.raises(ConfigurationError, match=rf"{name} has more than one column 'text'; rename or remove all but one$"):
            list(read_rows(tmp_path / name))


def test_columns_of_images_are_not_read(tmp_path: Path) -> None:
    rows = [{"text": "a", "image": {"bytes": b"x" * 100, "path": "a.png"}, "raw": b"y", "tags": ["b"]}]
    assert [row.values for row in read_rows(write_table(tmp_path / "table.parquet", rows))] == [{"text": "a", "tags": ["b"]}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("table.jsonl", b'{"a": 1}\n{"a"', r"line 2 of .*table\.jsonl is not JSON \("),
        (
            "table.jsonl",
            b'{"a": 1}\n' + b"[" * 200_000,
            r"line 2 of .*table\.jsonl is not JSON \(brackets are nested too deeply\)",
        ),
        ("table.jsonl", b'{"a": "caf\xe9"}', r"line 1 of .*table\.jsonl is not UTF-8"),
        ("table.json", b'[{"a": 1}', r"table\.json is not valid JSON"),
        ("table.json", b"[" * 200_000, r"table\.json is not valid JSON \(brackets are nested too deeply\)"),
        ("table.json", b'{"a": 1}', r"table\.json is not a JSON list; write a list"),
        ("table.json", b"\xff", r"text of .*table\.json is not UTF-8"),
        ("table.csv", b"file_name,text\na.png,a cat, asleep", r"line 2 of .*table\.csv has more cells than the header"),
        ("table.csv", b'file_name,text\na.png,"a cat', r"line 2 of .*table\.csv cannot be parsed"),
        ("table.csv", b"text\n" + b"a" * 200_000, r"line 2 of .*table\.csv cannot be parsed \(field larger than"),
        ("table.parquet", b"PAR1 and no more", r"table\.parquet is not a readable Parquet file"),
    ],
)
def test_damaged_files_raise_one_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message) as caught:
        list(read_rows(tmp_path / name))
    assert "\n" not in str(caught.value)


# Captions


@pytest.mark.parametrize("name", ["text", "caption", "prompt"])
def test_caption_column_is_found(name: str) -> None:
    column = CaptionColumn(Path("table.csv"), None)
    assert column.read(Row("line 2", {"id": 1, name: "a"})) == ["a"]
    assert column.name == name


def test_choice_between_columns_is_said() -> None:
    with pytest.warns(UserWarning, match=r"columns text, prompt: captions are read from 'text'; set data\.caption_column"):
        assert CaptionColumn(Path("table.csv"), None).read(Row("line 2", {"prompt": "a", "text": "b"})) == ["b"]
    assert CaptionColumn(Path("table.csv"), "prompt").read(Row("line 2", {"prompt": "a", "text": "b"})) == ["a"]


def test_list_of_captions() -> None:
    assert CaptionColumn(Path("table.jsonl"), None).read(Row("line 1", {"text": ["a", "b"]})) == ["a", "b"]


@pytest.mark.parametrize("value", [None, 1, [], ["a", None], {"a": "b"}])
def test_rows_without_caption_raise(value: Any) -> None:
    row = Row("row 3", {"file_name": "a.png", "text": value})
    with pytest.raises(ConfigurationError, match=r'row 3 of t has no string under "text"; correct or remove it$'):
        CaptionColumn(Path("t"), None).read(row)
    with pytest.raises(ConfigurationError, match=r'row 3 of t has no string under "words".* to one of text$'):
        CaptionColumn(Path("t"), "words").read(row)
    with pytest.raises(ConfigurationError, match="row 3 of t is not a JSON object"):
        CaptionColumn(Path("t"), None).read(Row("row 3", [value]))


def test_file_names_are_not_suggested_as_captions() -> None:
    with pytest.raises(ConfigurationError, match=r"; set data\.caption_column to one of words, id$"):
        CaptionColumn(Path("t"), None).read(Row("line 2", {"file_name": "a.png", "words": "a", "id": 1}))
    with pytest.raises(ConfigurationError, match=r'under "text", "caption" or "prompt"; add a column of captions$'):
        CaptionColumn(Path("t"), None).read(Row("line 2", {"file_name": "a.png"}))


def test_blank_captions_are_skipped_with_one_warning() -> None:
    column = CaptionColumn(Path("t.jsonl"), None)
    rows: list[Any] = ["a", "", ["b", " ", "c"], [" \t", "\u3000"]]
    read = [column.read(Row(f"line {number}", {"text": value})) for number, value in enumerate(rows, start=1)]
    assert read == [["a"], [], ["b", "c"], []]
    with pytest.warns(UserWarning, match=r"^skips 4 blank captions of t\.jsonl, first in line 2$") as caught:
        column.warn_of_changes()
    assert len(caught) == 1


@pytest.mark.parametrize(
    "content", [b"caf\xe9", "wide".encode("utf-16-le"), "a".encode("utf-32"), b"\xff\xfea", b"\xed\xa0\xbd"]
)
def test_other_encodings_raise(content: bytes) -> None:
    with pytest.raises(UnicodeDecodeError):
        decode_text(content)


def test_half_surrogate_pairs_are_replaced_with_one_warning() -> None:
    column = CaptionColumn(Path("t.jsonl"), None)
    texts = [json.loads(f'"{text}"') for text in (r"cut \ud83d", r"whole \ud83d\ude00", r"\ude00 cut")]
    read = [column.read(Row(f"line {number}", {"text": text}))[0] for number, text in enumerate(texts)]
    assert read == ["cut \ufffd", "whole 😀", "\ufffd cut"]
    with pytest.warns(UserWarning, match=r"2 captions of t\.jsonl have half of a surrogate pair, first in line 0") as caught:
        column.warn_of_changes()
    assert len(caught) == 1
