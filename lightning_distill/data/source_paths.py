"""Paths of data files: patterns as of a shell, in the notation of webdataset."""

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand
from lightning.pytorch.utilities import rank_zero_warn

from lightning_distill.errors import ConfigurationError
from lightning_distill.paths import expand_path

_TAR_ENDING = re.compile(r"\.(tar(\.\w+)?|tgz)$", re.IGNORECASE)


def split_patterns(source: str | Sequence[str]) -> list[str]:
    """Patterns of a source: a list of them, or one text that separates them by `::`."""
    parts = [source] if isinstance(source, str) else source
    return [pattern.strip() for part in parts for pattern in part.split("::") if pattern.strip()]


def tar_patterns(source: str | Sequence[str], setting: str) -> list[str]:
    """Patterns of a source that names tar files, compressed ones included; none if it names other data.

    Args:
        source: Patterns. A directory with tar files stands for these.
        setting: Name of the setting with the source, for error messages.
    """
    patterns = split_patterns(source)
    in_directories = [os.path.join(glob.escape(expand_path(pattern, setting)), "*.tar") for pattern in patterns]
    replaced = [wide if glob.glob(wide) else pattern for pattern, wide in zip(patterns, in_directories, strict=True)]
    return replaced if any(_TAR_ENDING.search(pattern) for pattern in replaced) else []


def find_files(source: str | Sequence[str], setting: str) -> list[Path]:
    """Paths of the files that patterns name, in the order of the patterns; those of one pattern are sorted.

    Args:
        source: Patterns with `*`, `?`, `[...]`, braces such as `{00000..00099}` or `{a,b}`, `~` and environment variables.
        setting: Name of the setting with the source, for error messages.

    Raises:
        ConfigurationError: If a pattern matches no file, or a file that it names without a wildcard is missing.
    """
    found: list[Path] = []
    for pattern in split_patterns(source):
        found += _find_pattern(pattern, setting)
    repeated = [path for path, count in Counter(found).items() if count > 1]
    if repeated:
        rank_zero_warn(f"{setting} names {len(repeated)} files more than once, first {repeated[0]}; each is read once")
    return list(dict.fromkeys(found))


def _find_pattern(pattern: str, setting: str) -> list[Path]:
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ConfigurationError(
            f"{setting} is {pattern!r}, but only files of this machine are read; download it and give its path"
        )
    expanded = expand_path(pattern, setting)
    try:
        names = [expanded] if os.path.isfile(expanded) else list(braceexpand(expanded, escape=False))
    except ValueError as error:
        raise ConfigurationError(f"{setting} is {pattern!r}, whose braces do not match; correct it") from error
    found: list[Path] = []
    missing: list[str] = []
    for name in names:
        matches = [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
        found += map(Path, matches)
        missing += [] if matches else [name]
    if not found:
        raise ConfigurationError(f"{setting} is {pattern!r}, which matches no file; correct the path")
    if missing:
        raise ConfigurationError(
            f"{setting} is {pattern!r}, but {len(missing)} of its {len(names)} files are missing, first {missing[0]}; add "
            "them, or correct the pattern"
        )
    return found
