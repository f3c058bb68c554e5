"""Captions of the image files in a directory, from a table of metadata or from text files beside the images."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_distill.data.caption_tables import ENDINGS, CaptionColumn, decode_text, read_rows
from lightning_distill.data.image_files import IMAGE_SUFFIXES
from lightning_distill.errors import ConfigurationError

METADATA = tuple(f"metadata{ending}" for ending in ENDINGS)
"""Names of tables of metadata."""
FILE_NAME = "file_name"
"""Column of the file names, relative to the directory."""
_EXAMPLES = 3
"""How many files a message names."""


@dataclass(frozen=True)
class CaptionedImage:
    """An image file and its captions.

    Attributes:
        file_name: Path of the image file, relative to the directory.
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
    sub-directories, `0001.txt` for `0001.jpg`; images without one are skipped, with a warning.

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
            raise ConfigurationError(f"{tables[0]} of {setting} is empty; write a line for each image")
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


def check_files(directory: Path, samples: Sequence[CaptionedImage], setting: str) -> None:
    """Check that all image files exist, and warn once of files outside the directory. Lists directories, opens no file.

    Raises:
        ConfigurationError: If files are missing, or are no regular files, such as pipes.
    """
    found: dict[str, set[str]] = {}
    missing, outside = [], []
    root = os.path.abspath(directory)
    for name in dict.fromkeys(sample.file_name for sample in samples):
        path = os.path.normpath(os.path.join(root, name))
        parent, file = os.path.split(path)
        if parent not in found:
            found[parent] = _regular_files(parent)
        # A file system that ignores case finds more names than a listing has.
        if file not in found[parent] and not os.path.isfile(path):
            missing.append(name)
        elif not path.startswith(os.path.join(root, "")):
            outside.append(name)
    if missing:
        first = next(sample.place for sample in samples if sample.file_name == missing[0])
        raise ConfigurationError(
            f"{len(missing)} image files of {setting} {str(directory)!r} are missing or not regular files: {_first(missing)}, "
            f"first in {first}; names are relative to the directory: add the files, correct the names, or remove the lines"
        )
    if outside:
        rank_zero_warn(f"{len(outside)} image files of {setting} {str(directory)!r} are outside of it: {_first(outside)}")


def _first(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_EXAMPLES])) + (", ..." if len(names) > _EXAMPLES else "")


def _regular_files(directory: str) -> set[str]:
    try:
        with os.scandir(directory) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # no directory, none that can be listed, or no valid name
        return set()


def _from_table(path: Path, caption_column: str | None) -> Iterator[CaptionedImage]:
    column = CaptionColumn(path, caption_column)
    for row in read_rows(path):
        captions = column.read(row)
        name = row.values.get(FILE_NAME)
        if not isinstance(name, str) or not name:
            raise ConfigurationError(f'{row.place} of {path} has no string under "{FILE_NAME}"; correct or remove it')
        yield CaptionedImage(_with_slashes(name, path.parent), tuple(captions), f"{row.place} of {path.name}")
    column.warn_of_replacements()


def _with_slashes(name: str, directory: Path) -> str:
    r"""Name with `/` in place of the `\` of Windows, unless a file is named with it."""
    return name.replace("\\", "/") if "\\" in name and not (directory / name).exists() else name


def _from_text_files(directory: Path, setting: str) -> list[CaptionedImage]:
    samples: list[CaptionedImage] = []
    bare, alone, tables = [], [], []
    for folder, files in _folders(directory):
        texts = {file[:-4]: file for file in files if file.lower().endswith(".txt")}
        used = set()
        for file in files:
            name, (stem, ending) = os.path.join(folder, file), os.path.splitext(file)
            if file.lower() in METADATA:
                tables.append(name)
            elif ending.lower() in IMAGE_SUFFIXES and stem in texts:
                text = os.path.join(folder, texts[stem])
                used.add(stem)
                samples.append(CaptionedImage(name, (_read_text(directory / text),), text))
            elif ending.lower() in IMAGE_SUFFIXES:
                bare.append(name)
        alone += [os.path.join(folder, texts[stem]) for stem in sorted(texts.keys() - used)]
    if not samples:
        hint = f"; {tables[0]} is in a sub-directory: set {setting} to that" if tables else ""
        raise ConfigurationError(
            f"{setting} is {str(directory)!r}, which has no metadata.jsonl, and no .txt beside its {len(bare)} images; write "
            f'a metadata.jsonl with a line {{"file_name": "0001.jpg", "text": "a caption"}} for each image{hint}'
        )
    if bare:
        rank_zero_warn(f"skips {len(bare)} images without a .txt beside them in {directory} of {setting}: {_first(bare)}")
    if alone:
        rank_zero_warn(
            f"skips {len(alone)} .txt files without an image ({', '.join(IMAGE_SUFFIXES)}) beside them in {directory} of "
            f"{setting}: {_first(alone)}"
        )
    return samples


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
