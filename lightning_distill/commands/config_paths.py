"""Expansion of `~` and environment variables in all settings that are paths."""

import re
from pathlib import PurePath
from typing import Any

from jsonargparse import Namespace

from lightning_distill.paths import expand_path

_PATH_SETTING = re.compile(r"(?:^|[._])(?:path|dir|dirpath|directory|file|source|pretrained|model_config|out)$")
"""Names of settings that are paths, also those of loggers and of classes of the user."""
_STRUCTURE = ("init_args", "dict_kwargs")
"""Keys of a config that are no part of a setting's dotted name."""


def expand_paths(settings: Namespace | dict[str, Any], prefix: str = "") -> None:
    """Expand the paths among the settings in place.

    Args:
        settings: Parsed settings, or a part of them.
        prefix: Dotted name of the part, for error messages.

    Raises:
        ConfigurationError: If an environment variable is not set, or the user of `~user` is unknown.
    """
    for key, value in list(settings.items()):
        parts = [*prefix.split("."), *str(key).split(".")]
        name = ".".join(part for part in parts if part and part not in _STRUCTURE)
        settings[key] = _expanded(value, name)


def _expanded(value: Any, name: str) -> Any:
    if isinstance(value, Namespace | dict):
        expand_paths(value, name)
    elif isinstance(value, list):
        return [_expanded(each, name) for each in value]
    elif isinstance(value, str | PurePath) and _PATH_SETTING.search(name) and not name.endswith("class_path"):
        return type(value)(expand_path(str(value), name))
    return value
