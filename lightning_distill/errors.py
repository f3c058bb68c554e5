"""Errors that the command line reports as one line on stderr, without a traceback."""


class ConfigurationError(ValueError):
    """A setting with an invalid value. The message is one line that names the setting and the remedy.

    The command line prints the message and exits with code 2.
    """


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite. The command line prints the message and exits with code 1."""


class StorageError(RuntimeError):
    """A disk is full or fails. The message is one line that names the output.

    The command line prints the message and exits with code 1.
    """


def find_configuration_error(error: BaseException | None) -> ConfigurationError | None:
    """First `ConfigurationError` in a chain of causes; jsonargparse wraps the errors of constructors."""
    while error is not None and not isinstance(error, ConfigurationError):
        error = error.__cause__ or error.__context__
    return error
