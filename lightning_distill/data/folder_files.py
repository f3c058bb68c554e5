r"""Image files that captions name: as written, with the `\` of Windows, or in another normal form of Unicode."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lightning_distill.data.folder_captions import CaptionedImage, first_names
from lightning_distill.errors import ConfigurationError


def find_files(
    directory: Path, samples: Sequence[CaptionedImage], setting: str, *, may_be_missing: bool = False
) -> list[CaptionedImage]:
    """Samples with the names of their files as on disk. Lists directories, opens no file.

    Logs one warning if files are outside the directory.

    Args:
        directory: Directory of the images.
        samples: Image files and their captions.
        setting: Name of the setting with the directory, for messages.
        may_be_missing: Whether samples without a file keep their names as written, as prediction loads no images.

    Raises:
        ConfigurationError: If files are missing, or are no regular files, such as pipes, unless `may_be_missing`.
    """
    found: dict[str, str] = {}
    missing, outside = [], []
    root = os.path.abspath(directory)
    listings = _Listings()
    for name in dict.fromkeys(sample.file_name for sample in samples):
        located = listings.locate(root, name)
        if located is None:
            missing.append(name)
            continue
        found[name] = located
        if not os.path.normpath(os.path.join(root, located)).startswith(os.path.join(root, "")):
            outside.append(name)
    if missing and not may_be_missing:
        first = next(sample.place for sample in samples if sample.file_name == missing[0])
        raise ConfigurationError(
            f"{len(missing)} image files of {setting} {str(directory)!r} are missing or not regular files: "
            f"{first_names(missing)}, first in {first}; names are relative to the directory: add the files, correct the names, "
            "or remove the lines"
        )
    if outside:
        rank_zero_warn(f"{len(outside)} image files of {setting} {str(directory)!r} are outside of it: {first_names(outside)}")
    return [replace(sample, file_name=found.get(sample.file_name, sample.file_name)) for sample in samples]


def comparable(name: str) -> str:
    r"""Name with `/` in place of `\`, in the composed normal form: equal for all spellings of one file's name."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


class _Listings:
    """Listings of directories, each read once."""

    def __init__(self) -> None:
        self._files: dict[str, set[str]] = {}
        self._names: dict[str, dict[str, list[str]]] = {}

    def locate(self, root: str, name: str) -> str | None:
        r"""Name of a regular file as on disk, relative to a directory; None if there is none.

        Tried in order: the name as written, with `/` in place of `\`, and in another normal form, as macOS and Linux differ.
        """
        slashes = name.replace("\\", "/")
        for candidate in dict.fromkeys((name, slashes)):
            if self._is_file(os.path.normpath(os.path.join(root, candidate))):
                return candidate
        normal = None if slashes.isascii() else self._in_any_form(root, slashes)
        return normal if normal is not None and self._is_file(os.path.normpath(os.path.join(root, normal))) else None

    def _is_file(self, path: str) -> bool:
        parent, file = os.path.split(path)
        if parent not in self._files:
            self._files[parent] = _regular_files(parent)
        # A file system that ignores case finds more names than a listing has.
        return file in self._files[parent] or os.path.isfile(path)

    def _in_any_form(self, root: str, name: str) -> str | None:
        """Name whose parts are as on disk, where exactly one entry equals each in its normal form."""
        parts = name.split("/")
        for number, part in enumerate(parts):
            parent = os.path.join(root, "/".join(parts[:number]) + "/" if number else "")
            if part in ("", ".", "..") or part.isascii():
                continue
            if parent not in self._names:
                self._names[parent] = _by_normal_form(parent)
            matches = self._names[parent].get(unicodedata.normalize("NFC", part), [])
            if part not in matches:
                if len(matches) != 1:
                    return None
                parts[number] = matches[0]
        return "/".join(parts)


def _regular_files(directory: str) -> set[str]:
    try:
        with os.scandir(directory) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # no directory, none that can be listed, or no valid name
        return set()


def _by_normal_form(directory: str) -> dict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    try:
        for name in os.listdir(directory):
            found[unicodedata.normalize("NFC", name)].append(name)
    except (OSError, ValueError):  # as above
        return {}
    return dict(found)
