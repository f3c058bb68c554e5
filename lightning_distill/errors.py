"""Errors that the command line reports as one line on stderr, without a traceback."""

from collections.abc import Sequence


class ConfigurationError(ValueError):
    """A setting with an invalid value. The message is one line that names the setting and the remedy.

    The command line prints the message and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        # A `DataLoader` worker re-raises an error with its traceback as the message. The original message is at the end.
        super().__init__(message.rstrip().rsplit(f"{type(self).__name__}: ", 1)[-1])


class DamagedFileError(ConfigurationError):
    """A file that is not what was written, such as a checkpoint with a flipped bit."""


class RunError(RuntimeError):
    """A run that cannot continue, through no setting in particular. The message is one line.

    The command line prints the message and exits with code 1.
    """


class NonFiniteError(RunError):
    """A loss, a gradient or a weight is NaN or infinite.

    Args:
        message: What it is.
        network: Name of the network that it belongs to, such as critic, if it is known.
    """

    def __init__(self, message: str, network: str | None = None) -> None:
        super().__init__(message)
        self.network = network


class StorageError(RunError):
    """A disk is full or fails. The message names the output."""


def first_and_count(names: Sequence[str]) -> str:
    """The first name in quotes, and how many follow if any do, as in `'a' and 2 more`."""
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def alternatives(values: Sequence[object]) -> str:
    """Values as in `1, 2 or 4`."""
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


def find_configuration_error(error: BaseException | None) -> ConfigurationError | None:
    """First `ConfigurationError` in a chain of causes; jsonargparse wraps the errors of constructors."""
    while error is not None and not isinstance(error, ConfigurationError):
        error = error.__cause__ or error.__context__
    return error
