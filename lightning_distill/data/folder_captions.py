"""Captions of the image files in a directory, from a table of metadata or from text files beside the images."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_distill.data.caption_tables import ENDINGS, FILE_NAME, CaptionColumn, decode_text, read_rows
from lightning_distill.data.image_files import IMAGE_SUFFIXES
from lightning_distill.errors import ConfigurationError

METADATA = tuple(f"metadata{ending}" for ending in ENDINGS)
"""Names of tables of metadata."""
_EXAMPLES = 3
"""How many files a message names."""


@dataclass(frozen=True)
class CaptionedImage:
    """An image file and its captions.

    Attributes:
        file_name: Path of the image file, relative to the directory, as the table has it.
        captions: Captions, at least one.
        place: Place of the captions, such as "line 3 of metadata.jsonl" or "0003.txt".
    """

    file_name: str
    captions: tuple[str, ...]
    place: str


def read_captions(directory: Path, setting: str, caption_column: str | None = None) -> list[CaptionedImage]:
    """Image files of a directory that have captions.

    The captions come from the directory's table of metadata, one of `METADATA`, with the columns `file_name` and
    `caption_column`. If there is no table, they come from a text file beside each image of the directory and its
    sub-directories, `0001.txt` for `0001.jpg`. Images without a caption and blank captions are skipped, with a warning.

    Args:
        directory: Directory of the images.
        setting: Name of the setting with the directory, for messages.
        caption_column: Column of the captions; None searches it.

    Raises:
        ConfigurationError: If the directory is missing, a caption cannot be read, or there are none.
    """
    if not directory.is_dir():
        raise ConfigurationError(
            f"{setting} is {str(directory)!r}, which is not a directory; give one with images and their captions"
        )
    with os.scandir(directory) as entries:
        tables = sorted(Path(entry) for entry in entries if entry.name.lower() in METADATA and entry.is_file())
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise ConfigurationError(f"{setting} is {str(directory)!r}, which has {names}; keep one of them")
    if tables:
        samples = list(_from_table(tables[0], caption_column))
        if not samples:
            raise ConfigurationError(f"{tables[0]} of {setting} has no captions; write a line with one for each image")
        source = tables[0].name
    elif caption_column is not None:
        raise ConfigurationError(
            f"data.caption_column is {caption_column!r}, but {setting} is {str(directory)!r}, which has no table of metadata; "
            "write a metadata.jsonl, or remove data.caption_column"
        )
    else:
        samples = _from_text_files(directory, setting)
        source = "text files"
    rank_zero_info(f"{len(samples)} captioned images in {directory}, by {source}")
    return samples


def first_names(names: Sequence[str]) -> str:
    """The first of many names, quoted as written, for messages; those that cannot be printed are escaped."""
    quoted = [f"'{name}'" if name.isprintable() else repr(name) for name in names[:_EXAMPLES]]
    return ", ".join(quoted) + (", ..." if len(names) > _EXAMPLES else "")


def _from_table(path: Path, caption_column: str | None) -> Iterator[CaptionedImage]:
    column = CaptionColumn(path, caption_column)
    for row in read_rows(path):
        captions = column.read(row)
        name = row.values.get(FILE_NAME)
        if not isinstance(name, str) or not name:
            raise ConfigurationError(f'{row.place} of {path} has no string under "{FILE_NAME}"; correct or remove it')
        if captions:
            yield CaptionedImage(name, tuple(captions), f"{row.place} of {path.name}")
    column.warn_of_changes()


def _from_text_files(directory: Path, setting: str) -> list[CaptionedImage]:
    samples: list[CaptionedImage] = []
    bare, blank, alone, tables = [], [], [], []
    for folder, files in _folders(directory):
        texts = _TextFiles(files)
        for file in files:
            name, (stem, ending) = os.path.join(folder, file), os.path.splitext(file)
            if file.lower() in METADATA:
                tables.append(name)
            elif ending.lower() not in IMAGE_SUFFIXES:
                continue
            elif (text := texts.beside(stem)) is None:
                bare.append(name)
            elif caption := _read_text(directory / folder / text):
                samples.append(CaptionedImage(name, (caption,), os.path.join(folder, text)))
            else:
                blank.append(name)
        alone += [os.path.join(folder, text) for text in texts.unused()]
    if not samples and blank:
        raise ConfigurationError(
            f"{setting} is {str(directory)!r}, whose .txt files beside images are all blank: {len(blank)}, first beside "
            f"{first_names(blank[:1])}; write the captions"
        )
    if not samples:
        hint = f"; {tables[0]} is in a sub-directory: set {setting} to that" if tables else ""
        raise ConfigurationError(
            f"{setting} is {str(directory)!r}, which has no metadata.jsonl, and no .txt beside its {len(bare)} images; write "
            f'a metadata.jsonl with a line {{"file_name": "0001.jpg", "text": "a caption"}} for each image{hint}'
        )
    if bare:
        rank_zero_warn(f"skips {len(bare)} images without a .txt beside them in {directory} of {setting}: {first_names(bare)}")
    if blank:
        rank_zero_warn(
            f"skips {len(blank)} images with a blank .txt beside them in {directory} of {setting}: {first_names(blank)}"
        )
    if alone:
        rank_zero_warn(
            f"skips {len(alone)} .txt files without an image ({', '.join(IMAGE_SUFFIXES)}) beside them in {directory} of "
            f"{setting}: {first_names(alone)}"
        )
    return samples


class _TextFiles:
    """Text files of a directory by their stems.

    Args:
        files: Names of all files of the directory.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self._by_stem = {file[:-4]: file for file in files if file.lower().endswith(".txt")}
        self._by_form: defaultdict[str, list[str]] = defaultdict(list)
        for stem in self._by_stem:
            self._by_form[unicodedata.normalize("NFC", stem)].append(stem)
        self._used: set[str] = set()

    def beside(self, stem: str) -> str | None:
        """Text file with the stem of an image; else the only one with the stem in another normal form."""
        if stem not in self._by_stem:
            stems = self._by_form.get(unicodedata.normalize("NFC", stem), [])
            if len(stems) != 1:
                return None
            stem = stems[0]
        self._used.add(stem)
        return self._by_stem[stem]

    def unused(self) -> list[str]:
        """Text files that are beside no image."""
        return [self._by_stem[stem] for stem in sorted(self._by_stem.keys() - self._used)]


def _folders(directory: Path) -> Iterator[tuple[str, list[str]]]:
    """Relative names of a directory and its sub-directories, and of their files; names with a leading dot are skipped."""
    visited = set()
    for folder, subfolders, files in os.walk(directory, followlinks=True):
        real = os.path.realpath(folder)
        subfolders[:] = [] if real in visited else sorted(name for name in subfolders if name[0] != ".")
        if real not in visited:  # a link may lead back
            visited.add(real)
            relative = os.path.relpath(folder, directory)
            yield "" if relative == "." else relative, sorted(name for name in files if name[0] != ".")


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ConfigurationError(f"{path} is not a regular file; replace or remove it")
    try:
        return decode_text(path.read_bytes()).strip()
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 ({error.reason}); convert it to UTF-8, or remove it") from error
