"""Files with captions: tables in JSON, CSV or Parquet, lists of prompts, and plain text.

Endings are read in any case. Text is UTF-8, or UTF-16 with a byte order mark, and lines end as on any system. A caption is a
string or a list of strings.
"""

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_distill.errors import ConfigurationError

CAPTION_COLUMNS = ("text", "caption", "prompt")
"""Columns that have captions if the setting `caption_column` is null, in order of preference."""
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """Row of a table.

    Attributes:
        place: Place in the file, such as "line 3".
        values: Value of each column; other types for rows that are no objects.
    """

    place: str
    values: Any


def decode_text(content: bytes) -> str:
    """Text of a file's content, without its byte order mark.

    Raises:
        UnicodeDecodeError: If the content is neither UTF-8, nor UTF-16 with a byte order mark.
    """
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if wide else "utf-8-sig")
    if "\0" in text:  # UTF-16 without a byte order mark, UTF-32, or no text at all
        position = content.index(0)
        raise UnicodeDecodeError("utf-8", content, position, position + 1, "null character, as in other encodings")
    return text


def as_captions(value: Any) -> tuple[str, ...]:
    """Captions in a value: one for a string, several for a list of strings, and none otherwise."""
    values = value if isinstance(value, list) else [value]
    return tuple(values) if all(isinstance(each, str) for each in values) else ()


def replace_lone_surrogates(text: str) -> str:
    """Text with U+FFFD for each half of a character that JSON escapes cut off, which tokenizers cannot encode."""
    return _SURROGATE.sub("\ufffd", text)


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: If the text is not JSON, or too deeply nested.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("brackets are nested too deeply") from error


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a table or list, by the ending of its name, one of `ENDINGS`.

    Raises:
        ConfigurationError: If the file cannot be parsed.
    """
    return ENDINGS[path.suffix.lower()](path)


def read_lines(path: Path) -> Iterator[Row]:
    """Lines of a text file, without their ends.

    Raises:
        ConfigurationError: If a line is neither UTF-8, nor UTF-16 with a byte order mark.
    """
    with path.open("rb") as file:
        wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        file.seek(0)
        lines = _decoded(file.read(), "text", path).encode().splitlines(keepends=True) if wide else file
        for number, line in enumerate(lines, start=1):
            yield Row(f"line {number}", _decoded(line, f"line {number}", path))


def _decoded(content: bytes, place: str, path: Path) -> str:
    try:
        return decode_text(content)
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{place} of {path} is not UTF-8 ({error.reason}); convert it to UTF-8") from error


def _json_lines(path: Path) -> Iterator[Row]:
    for row in read_lines(path):
        if row.values.strip():
            try:
                yield Row(row.place, parse_json(row.values))
            except ValueError as error:
                raise ConfigurationError(f"{row.place} of {path} is not JSON ({error}); correct or remove it") from error


def _json_list(path: Path) -> Iterator[Row]:
    text = _decoded(path.read_bytes(), "text", path)
    try:
        rows = parse_json(text)
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":  # JSON Lines by another name
            yield from _json_lines(path)
            return
        raise ConfigurationError(f"{path} is not valid JSON ({error}); correct it") from error
    if not isinstance(rows, list):
        raise ConfigurationError(f"{path} is not a JSON list; write a list of captions or of objects, or use .jsonl")
    for number, values in enumerate(rows, start=1):
        yield Row(f"entry {number}", values)


def _delimited(path: Path, dialect: type[csv.Dialect]) -> Iterator[Row]:
    reader = csv.DictReader((row.values for row in read_lines(path)), dialect=dialect, strict=True)
    try:
        for values in reader:
            if None in values:
                raise ConfigurationError(
                    f"line {reader.line_num} of {path} has more cells than the header; put quotes around cells with a delimiter"
                )
            yield Row(f"line {reader.line_num}", values)
    except csv.Error as error:
        raise ConfigurationError(f"line {reader.reader.line_num} of {path} cannot be parsed ({error}); correct it") from error


def _csv(path: Path) -> Iterator[Row]:
    return _delimited(path, csv.excel)


def _tsv(path: Path) -> Iterator[Row]:
    return _delimited(path, csv.excel_tab)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigurationError(
            f'{path} needs the package pyarrow; install it with pip install -c constraints.txt -e ".[data]"'
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            # Columns of images would fill the memory.
            columns = [field.name for field in file.schema_arrow if not _is_binary(field.type)]
            for batch in file.iter_batches(columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", values)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{path} is not a readable Parquet file ({reason}); replace it") from error


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    return types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind)


ENDINGS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
"""Readers of tables by the lower-case endings of their names."""


class CaptionColumn:
    """Captions of a file's rows, from one column.

    Args:
        path: File, for messages.
        name: Name of the column; None selects the first of `CAPTION_COLUMNS` that the first row has.
    """

    def __init__(self, path: Path, name: str | None) -> None:
        self.path = path
        self.name = name
        self._replaced: list[str] = []

    def read(self, row: Row) -> list[str]:
        """Captions of a row, at least one. Halves of a surrogate pair, as a cut emoji has, become U+FFFD.

        Raises:
            ConfigurationError: If the row has no caption.
        """
        if not isinstance(row.values, dict):
            raise ConfigurationError(f"{row.place} of {self.path} is not a JSON object; correct or remove it")
        self.name = self.name or self._find(row)
        if not (captions := as_captions(row.values.get(self.name))):
            raise ConfigurationError(
                f'{row.place} of {self.path} has no string under "{self.name}"; correct or remove it, or set '
                f"data.caption_column to one of {', '.join(map(str, row.values))}"
            )
        return [self.replace_surrogates(caption, row.place) for caption in captions]

    def replace_surrogates(self, caption: str, place: str) -> str:
        """Caption with U+FFFD for each half of a surrogate pair, which no tokenizer can encode."""
        replaced = replace_lone_surrogates(caption)
        if replaced != caption:
            self._replaced.append(place)
        return replaced

    def warn_of_replacements(self) -> None:
        """Log one warning if captions had halves of a surrogate pair."""
        if self._replaced:
            rank_zero_warn(
                f"{len(self._replaced)} captions of {self.path} have half of a surrogate pair, first in {self._replaced[0]}; "
                "it is replaced by U+FFFD"
            )

    def _find(self, row: Row) -> str:
        found = [name for name in CAPTION_COLUMNS if name in row.values]
        if not found:
            raise ConfigurationError(
                f'{row.place} of {self.path} has no string under "text", "caption" or "prompt"; set data.caption_column to '
                f"one of {', '.join(map(str, row.values)) or 'its columns'}"
            )
        if len(found) > 1:
            rank_zero_warn(
                f"{self.path} has the columns {', '.join(found)}: captions are read from {found[0]!r}; set data.caption_column "
                "to choose"
            )
        return found[0]
