"""One-line messages for constructors that do not accept the settings of a config."""

from collections.abc import Iterator
from types import TracebackType

from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

PACKAGE = __name__.partition(".")[0]


def constructor_error(error: BaseException | None) -> str | None:
    """Message for an error of a constructor that settings have called, or None for an error of this package itself.

    Args:
        error: Error of jsonargparse, whose causes are those of the constructors.
    """
    for cause in _causes(error):
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            return f"the settings need the package {cause.name}, which is not installed; run `pip install {cause.name}`"
        kind = _failed_class(cause.__traceback__)
        if kind is None:
            continue
        if isinstance(cause, MisconfigurationException | ImportError) or kind.__module__.partition(".")[0] != PACKAGE:
            reason = " ".join(str(cause).split()).rstrip(".!")
            return f"{kind.__name__} does not accept its settings ({reason}); correct them"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _failed_class(traceback: TracebackType | None) -> type | None:
    """Class of the outermost constructor in a traceback, besides the command line's own."""
    while traceback is not None:
        frame = traceback.tb_frame
        built = frame.f_locals.get("self")
        if frame.f_code.co_name in ("__init__", "__post_init__") and not isinstance(built, LightningCLI):
            kind = type(built)
            if not kind.__module__.startswith(("jsonargparse", "argparse")):
                return kind
        traceback = traceback.tb_next
    return None
