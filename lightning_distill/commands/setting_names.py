"""Names of the model's settings as on the command line, in errors of objects that do not know where they are used."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_DOTTED = re.compile(r"(?<![\w./'\"{-])[a-z_]+(?:\.[a-z_]+)+(?![\w/]|\.\w)")
_SUBJECT = re.compile(r"^[a-z_]+(?= is )")


def with_full_names(message: str, settings: Mapping[str, Any]) -> str:
    """A message whose names of the model's settings, such as `guidance.scale`, are complete: `model.guidance.scale`.

    Args:
        message: Message of an error.
        settings: Settings of the run as nested plain values.
    """
    names = dict(_dotted(settings, ""))

    def full(match: re.Match[str]) -> str:
        name = match[0]
        found = [each for each in names if each.startswith("model.") and each.endswith(f".{name}")]
        if name in names or not found:
            return name
        # A critic has settings of the same names as the student.
        given = [each for each in found if message[match.end() :].startswith(f" is {names[each]}")]
        return min(given or found, key=len)

    if (subject := _SUBJECT.match(message)) is not None and subject[0] not in names and f"model.{subject[0]}" in names:
        message = f"model.{message}"
    return _DOTTED.sub(full, message)


def _dotted(settings: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """All settings and groups of settings by name, without `init_args`; those in lists have no name."""
    for key, value in settings.items() if isinstance(settings, Mapping) else ():
        name = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
        yield name, value
        yield from _dotted(value, name)
