"""Captions of images in tar files: decoding of `.txt` and `.json` members."""

from collections.abc import Sequence

from lightning_distill.data.caption_tables import CAPTION_COLUMNS, as_captions, decode_text, parse_json, without_blanks

CAPTION_SUFFIXES = (".txt", ".json")
MAX_CAPTION_BYTES = 1 << 20
"""Size of the largest `.txt` or `.json` file that is read."""


_BLANK = "images whose caption is blank"


class CaptionError(ValueError):
    """A file has no caption. The message is a noun phrase for counts: the kind of image that is skipped."""


def read_text(content: bytes) -> str:
    """Caption in a `.txt` file: UTF-8, or UTF-16 with a byte order mark.

    Raises:
        CaptionError: If the file is in another encoding, or blank.
    """
    try:
        text = decode_text(content).strip()
    except UnicodeDecodeError as error:
        raise CaptionError("images whose caption is not UTF-8") from error
    if not text:
        raise CaptionError(_BLANK)
    return text


def read_json(content: bytes, column: str | None) -> tuple[tuple[str, ...], Sequence[str]]:
    """Captions in a `.json` file.

    Args:
        content: The file.
        column: Key of the captions; None takes the first of `CAPTION_COLUMNS` that the file has.

    Returns:
        Captions, at least one that is not blank, and the keys in question that have such captions.

    Raises:
        CaptionError: If the file is not a JSON object, has neither a string nor a list of strings under the key, or these are
            blank.
    """
    try:
        entry = parse_json(decode_text(content))
    except ValueError as error:
        raise CaptionError("images whose caption is not valid JSON") from error
    keys = CAPTION_COLUMNS if column is None else (column,)
    found = {key: captions for key in keys if isinstance(entry, dict) and (captions := as_captions(entry.get(key)))}
    if not found:
        raise CaptionError(f"images whose .json file has no string under {' or '.join(map(repr, keys))}")
    usable = {key: captions for key, captions in found.items() if without_blanks(captions)}
    if not usable:
        raise CaptionError(_BLANK)
    return next(iter(usable.values())), list(usable)
