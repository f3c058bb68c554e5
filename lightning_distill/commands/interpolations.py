"""One-line messages for interpolations such as `${trainer.max_steps}` that cannot be resolved."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationKeyError, OmegaConfBaseException, UnsupportedInterpolationType

from lightning_distill.commands.config_files import flatten
from lightning_distill.suggestions import nearest

_REFERENCE = re.compile(r"\$\{([a-zA-Z_][\w.\[\]]*)\}")


def interpolation_error(error: OmegaConfBaseException, known: Iterable[str], settings: Mapping[str, Any]) -> str:
    """Message for an interpolation that cannot be resolved.

    Args:
        error: Error of OmegaConf. It may name a setting that refers to the faulty one.
        known: Dotted names that an interpolation may refer to, besides those of the settings.
        settings: Nested settings with their interpolations.
    """
    faulty = _first_faults(settings)
    name, error = faulty if faulty is not None else (error.full_key or "a setting", error)
    setting = _in_brackets(name).replace(".init_args", "")
    reason = str(error).splitlines()[0]
    if isinstance(error, InterpolationKeyError):
        match = re.search(r"Interpolation key '\.*([^']*)'", reason)
        name = match[1] if match else reason
        near = nearest(name, {*known, *map(_in_brackets, flatten(settings))})
        hint = f"did you mean ${{{near}}}?" if near else "correct the name, with init_args for settings of a class"
        return f"{setting} refers to ${{{name}}}, which is not a setting; {hint}"
    if isinstance(error, UnsupportedInterpolationType):
        name = reason.rpartition(" ")[2]
        return f"{setting} uses the resolver {name!r}, which does not exist; use oc.env, oc.select or the name of a setting"
    if isinstance(error, GrammarParseError):
        return f"{setting} has an interpolation that cannot be read ({reason}); write it as ${{trainer.max_steps}}"
    if "Recursive" in reason:
        return f"{setting} refers to itself through its interpolations; set it to a value"
    if (variable := re.search(r"Environment variable '([^']*)' not found", reason)) is not None:
        name = variable[1]
        return (
            f"{setting} refers to the environment variable {name}, which is not set; set it, or give a default: "
            f"${{oc.env:{name},DEFAULT}}"
        )
    return f"{setting} has an interpolation that cannot be resolved ({reason}); correct it"


def _first_faults(settings: Mapping[str, Any]) -> tuple[str, OmegaConfBaseException] | None:
    """The setting with an interpolation that cannot be resolved, and not one that only refers to such a setting."""
    try:
        config = OmegaConf.create(dict(settings), flags={"allow_objects": True})
    except GrammarParseError as error:
        return error.full_key or "a setting", error
    errors: dict[str, OmegaConfBaseException] = {}
    references: dict[str, set[str]] = {}
    for name, text in flatten(settings).items():
        if isinstance(text, str) and "${" in text:
            try:
                OmegaConf.select(config, name)
            except OmegaConfBaseException as error:
                errors[_in_brackets(name)] = error
                references[_in_brackets(name)] = {*_REFERENCE.findall(text)}
    causes = [name for name in errors if not references[name] & errors.keys() - {name}]
    return next(((name, errors[name]) for name in [*causes, *errors]), None)


def _in_brackets(name: str) -> str:
    """A dotted name with the indices of lists in brackets."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", name)
