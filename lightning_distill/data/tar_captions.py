"""Captions of images in tar files: decoding of `.txt` and `.json` members."""

import codecs
import json

CAPTION_SUFFIXES = (".txt", ".json")
CAPTION_COLUMNS = ("caption", "text", "prompt")
"""Keys of captions in `.json` files, in the order in which they are tried without `caption_column`."""
MAX_CAPTION_BYTES = 1 << 20
"""Size of the largest `.txt` or `.json` file that is read."""
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class CaptionError(ValueError):
    """A file has no caption. The message is a noun phrase for counts: the kind of image that is skipped."""


def read_text(content: bytes) -> str:
    """Caption in a `.txt` file: UTF-8, or another UTF with a byte order mark.

    Raises:
        CaptionError: If the file is in another encoding.
    """
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise CaptionError("images whose caption is not UTF-8") from error
    if "\0" in text:  # UTF-16 without a byte order mark, or no text at all
        raise CaptionError("images whose caption is not UTF-8")
    return text.strip()


def read_json(content: bytes, column: str | None) -> str:
    """Caption in a `.json` file.

    Args:
        content: The file.
        column: Key of the caption; None takes the first of `CAPTION_COLUMNS` that the file has.

    Raises:
        CaptionError: If the file is not a JSON object, or has no string under the key.
    """
    try:
        entry = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CaptionError("images whose caption is not valid JSON") from error
    keys = CAPTION_COLUMNS if column is None else (column,)
    captions = [entry[key] for key in keys if isinstance(entry.get(key), str)] if isinstance(entry, dict) else []
    if not captions:
        wanted = " or ".join(repr(key) for key in keys)
        raise CaptionError(f"images whose .json file has no string under {wanted}")
    caption: str = captions[0]
    return caption


def replace_lone_surrogates(text: str) -> str:
    """Text with U+FFFD for each half of a character that JSON escapes cut off, which tokenizers cannot encode."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
