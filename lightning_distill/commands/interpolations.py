"""One-line messages for interpolations such as `${trainer.max_steps}` that cannot be resolved."""

import re
from collections.abc import Iterable

from omegaconf.errors import GrammarParseError, InterpolationKeyError, OmegaConfBaseException, UnsupportedInterpolationType

from lightning_distill.suggestions import nearest


def interpolation_error(error: OmegaConfBaseException, known: Iterable[str]) -> str:
    """Message for an interpolation that cannot be resolved.

    Args:
        error: Error of OmegaConf.
        known: Dotted names that an interpolation may refer to.
    """
    setting = (error.full_key or "a setting").replace(".init_args", "")
    reason = str(error).splitlines()[0]
    if isinstance(error, InterpolationKeyError):
        match = re.search(r"Interpolation key '\.*([^']*)'", reason)
        name = match[1] if match else reason
        near = nearest(name, known)
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
