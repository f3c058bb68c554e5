"""Expansion of `~` and environment variables in all settings that are paths."""

import re
from pathlib import PurePath
from typing import Any

from jsonargparse import Namespace

from lightning_distill.errors import ConfigurationError
from lightning_distill.paths import expand_path

_PATH_SETTING = re.compile(r"(?:^|[._])(?:path|dir|dirpath|directory|file|source|pretrained|model_config|out)$")
"""Names of settings that are paths, also those of loggers and of classes of the user."""
_STRUCTURE = ("init_args", "dict_kwargs")
"""Keys of a config that are no part of a setting's dotted name."""


def expand_paths(settings: Namespace | dict[str, Any]) -> None:
    """Expand the paths among the settings in place.

    Args:
        settings: Parsed settings.

    Raises:
        ConfigurationError: If an environment variable is not set, or the user of `~user` is unknown.
    """
    faults: list[tuple[int, ConfigurationError]] = []
    _expand(settings, "", faults)
    if faults:
        # A path that refers to another setting is longer than that one, which the user has to correct.
        raise min(faults, key=lambda fault: fault[0])[1]


def _expand(settings: Namespace | dict[str, Any], prefix: str, faults: list[tuple[int, ConfigurationError]]) -> None:
    for key, value in list(settings.items()):
        parts = [*prefix.split("."), *str(key).split(".")]
        name = ".".join(part for part in parts if part and part not in _STRUCTURE)
        settings[key] = _expanded(value, name, faults)


def _expanded(value: Any, name: str, faults: list[tuple[int, ConfigurationError]]) -> Any:
    """A setting with its paths expanded; appends the length and the error of each path that cannot be."""
    if isinstance(value, Namespace | dict):
        _expand(value, name, faults)
    elif isinstance(value, list):
        return [_expanded(each, name, faults) for each in value]
    elif isinstance(value, str | PurePath) and _PATH_SETTING.search(name) and not name.endswith("class_path"):
        try:
            return type(value)(expand_path(str(value), name))
        except ConfigurationError as error:
            faults.append((len(str(value)), error))
    return value
