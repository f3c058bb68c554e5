"""Why a module that a setting names cannot be imported, in words for one line."""

import sysconfig
import traceback
from importlib import import_module

_LIBRARIES = (*{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}, "<frozen")
"""Beginnings of the file names of modules that the user has not written."""


def module_fault(module: str) -> str | None:
    """What is wrong with a module: that there is none, or the error of its code with file and line; None if it is imported.

    Args:
        module: Dotted name of the module.
    """
    try:
        import_module(module)
    except Exception as error:  # the module is the user's code, which may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            return f"there is no module {error.name}"
        return f"its module cannot be imported ({_described(error)})"
    return None


def _described(error: Exception) -> str:
    """An error in one line, with the last line of the user's code that led to it."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}, {error.filename}, line {error.lineno}"
    frames = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith(_LIBRARIES)]
    # The first frame is that of this file.
    return f"{reason}, {frames[-1].filename}, line {frames[-1].lineno}" if len(frames) > 1 else reason
