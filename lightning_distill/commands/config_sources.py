"""The settings of a command line in reading order, as plain values, for the diagnosis of errors."""

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from lightning_distill.commands.config_files import config_chain
from lightning_distill.errors import ConfigurationError

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
"""Keys of a class in a config."""


def read_sources(arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Nested settings of each config file and of each argument, in reading order.

    Args:
        arguments: Arguments after the name of the subcommand, as `--trainer.max_steps 4` or `--trainer.max_steps=4`.
    """
    i = 0
    while i < len(arguments):
        name, equals, text = arguments[i].partition("=")
        i += 1
        if not name.startswith("-"):
            continue
        if not equals and i < len(arguments) and not arguments[i].startswith("--"):
            text = arguments[i]
            equals = "="
            i += 1
        if name in ("-c", "--config"):
            yield from _config(text)
        elif equals:
            yield _nested(name.lstrip("-").split("."), _value(text))
        else:
            yield _nested(name.lstrip("-").split("."), None)


def merged_sources(arguments: Sequence[str]) -> dict[str, Any]:
    """Nested settings of all config files and arguments together."""
    settings: dict[str, Any] = {}
    for source in read_sources(arguments):
        settings = merge(settings, source)
    return settings


def merge(old: Any, new: Any) -> Any:
    """Settings after a later source; a class keeps its arguments, also those that a new class may not have.

    Args:
        old: Settings of the earlier sources.
        new: Settings of the later source. A key that ends in `+` appends to a list.
    """
    if isinstance(old, list) and old and isinstance(new, dict):  # arguments of the last class in a list
        return [*old[:-1], merge(old[-1], new)]
    if isinstance(old, str) and isinstance(new, dict):
        old = {"class_path": old}
    if isinstance(old, dict) and "class_path" in old and isinstance(new, str):
        new = {"class_path": new}
    if not isinstance(old, dict) or not isinstance(new, dict):
        old, new = ({}, new) if isinstance(new, dict) else (None, new)
    if not isinstance(new, dict):
        return new
    if old.keys() & set(CLASS_KEYS) and not new.keys() & set(CLASS_KEYS):
        new = {"init_args": new}
    merged = dict(old)
    for key, value in new.items():
        name = str(key)
        if name.endswith("+"):
            name = name[:-1]
            before = merged.get(name) or []
            merged[name] = [
                *(before if isinstance(before, list) else [before]),
                *(value if isinstance(value, list) else [value]),
            ]
        else:
            merged[name] = merge(merged.get(name), value)
    return merged


def _config(text: str) -> Iterator[dict[str, Any]]:
    inline = "\n" in text or text.lstrip().startswith("{")
    try:
        contents = [text] if inline else [path.read_text() for path in config_chain(text)]
        for content in contents:
            loaded = yaml.safe_load(content)
            if isinstance(loaded, dict):
                yield loaded
    except (ConfigurationError, OSError, yaml.YAMLError):
        return  # reported where the config is read


def _value(text: str) -> Any:
    if text in ("null", "~"):
        return None
    if not text.startswith(("[", "{")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _nested(names: Sequence[str], value: Any) -> dict[str, Any]:
    for name in reversed(names):
        value = {name: value}
    assert isinstance(value, dict)
    return value
