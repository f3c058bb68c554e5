"""Paths as users write them: `~` for the home directory, and environment variables."""

import os
import re

from lightning_distill.errors import ConfigurationError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_HOME = re.compile(r"~[\w.-]*(?=/|$)")


def expand_path(path: str, setting: str) -> str:
    """Replace a leading `~` or `~user` by the home directory, and `$NAME` or `${NAME}` by environment variables.

    A name that exists as it is stays as it is, and so do URLs and Hub ids. Patterns (`*`, `{0..9}`) may be part of the path.

    Args:
        path: Path as the user wrote it.
        setting: Dotted name of the setting, for the error message.

    Raises:
        ConfigurationError: If an environment variable is not set, or the user of `~user` is unknown.
    """
    if os.path.lexists(path):
        return path
    for name in (first or second for first, second in _VARIABLE.findall(path)):
        if name not in os.environ:
            raise ConfigurationError(f"{setting} is {path!r}, but the environment variable {name} is not set; set it")
    expanded = os.path.expanduser(_VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], path))
    if _HOME.match(path) and expanded.startswith("~"):
        raise ConfigurationError(f"{setting} is {path!r}, but there is no such user; write the full path")
    return expanded
