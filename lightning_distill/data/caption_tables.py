"""Files with captions: tables in JSON, CSV or Parquet, lists of prompts, and plain text.

Endings are read in any case. Text is UTF-8, or UTF-16 with a byte order mark, and lines end as on any system. A caption is a
string or a list of strings.
"""

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_distill.errors import ConfigurationError

CAPTION_COLUMNS = ("text", "caption", "prompt")
"""Columns that have captions if the setting `caption_column` is null, in order of preference."""
FILE_NAME = "file_name"
"""Column of the file names of images."""
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


def without_blanks(captions: Sequence[str]) -> tuple[str, ...]:
    """Captions that are not blank. An empty prompt stands for no condition, which training applies by caption dropout."""
    return tuple(caption for caption in captions if caption.strip())


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
    r"""Lines of a text file, with their ends: `\n`, `\r\n`, or `\r`.

    Raises:
        ConfigurationError: If a line is neither UTF-8, nor UTF-16 with a byte order mark.
    """
    with path.open("rb") as file:
        wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        file.seek(0)
        parts: Iterable[bytes] = [_decoded(file.read(), "text", path).encode()] if wide else file
        lines = (line for part in parts for line in part.splitlines(keepends=True))  # a file's own lines end with \n only
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
    lines = (row.values for row in read_lines(path))
    reader = csv.DictReader(lines, dialect=dialect, strict=True, skipinitialspace=True)
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        _check_columns(reader.fieldnames, path)
        for values in reader:
            if None in values:
                raise ConfigurationError(
                    f"line {reader.line_num} of {path} has more cells than the header; put quotes around cells with a delimiter"
                )
            yield Row(f"line {reader.line_num}", values)
    except csv.Error as error:
        raise ConfigurationError(f"line {reader.reader.line_num} of {path} cannot be parsed ({error}); correct it") from error


def _check_columns(names: Sequence[str], path: Path) -> None:
    repeated = [name for name, count in Counter(names).items() if name and count > 1]
    if repeated:
        raise ConfigurationError(f"{path} has more than one column {repeated[0]!r}; rename or remove all but one")


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
            _check_columns(columns, path)
            for batch in file.iter_batches(columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", values)
    except ConfigurationError:  # a `ValueError`
        raise
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
        setting: Dotted name of the setting of `name`, for messages.
    """

    def __init__(self, path: Path, name: str | None, setting: str = "data.caption_column") -> None:
        self.path = path
        self.name = name
        self.setting = setting
        self._blank: list[str] = []
        self._replaced: list[str] = []

    def read(self, row: Row) -> list[str]:
        """Captions of a row, as `usable` returns them; none if all are blank.

        Raises:
            ConfigurationError: If the row has no caption.
        """
        if not isinstance(row.values, dict):
            raise ConfigurationError(f"{row.place} of {self.path} is not a JSON object; correct or remove it")
        self.name = self.name or self._find(row)
        if not (captions := as_captions(row.values.get(self.name))):
            others = self._other_columns(row)
            raise ConfigurationError(
                f'{row.place} of {self.path} has no string under "{self.name}"; correct or remove it'
                + (f", or set {self.setting} to one of {others}" if others else "")
            )
        return self.usable(captions, row.place)

    def usable(self, captions: Sequence[str], place: str) -> list[str]:
        """Captions that are not blank, with U+FFFD for halves of a surrogate pair, which no tokenizer can encode."""
        kept = without_blanks(captions)
        replaced = [replace_lone_surrogates(caption) for caption in kept]
        self._blank += [place] * (len(captions) - len(kept))
        self._replaced += [place for old, new in zip(kept, replaced, strict=True) if old != new]
        return replaced

    def warn_of_changes(self) -> None:
        """Log a warning if captions were blank, and one if captions had halves of a surrogate pair."""
        if self._blank:
            rank_zero_warn(f"skips {len(self._blank)} blank captions of {self.path}, first in {self._blank[0]}")
        if self._replaced:
            rank_zero_warn(
                f"{len(self._replaced)} captions of {self.path} have half of a surrogate pair, first in {self._replaced[0]}; "
                "it is replaced by U+FFFD"
            )

    def _find(self, row: Row) -> str:
        found = [name for name in CAPTION_COLUMNS if name in row.values]
        if not found:
            others = self._other_columns(row)
            raise ConfigurationError(
                f'{row.place} of {self.path} has no string under "text", "caption" or "prompt"; '
                + (f"set {self.setting} to one of {others}" if others else "add a column of captions")
            )
        if len(found) > 1:
            rank_zero_warn(
                f"{self.path} has the columns {', '.join(found)}: captions are read from {found[0]!r}; set {self.setting} to "
                "choose"
            )
        return found[0]

    def _other_columns(self, row: Row) -> str:
        """Columns of a row that may have captions, for messages."""
        return ", ".join(str(name) for name in row.values if name and name not in (FILE_NAME, self.name))
