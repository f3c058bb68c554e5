"""The errors of this package that are meant for the person at the command line: one sentence, no traceback."""


class ConfigurationError(ValueError):
    """A setting that cannot work. The message is one sentence that names the setting and the remedy.

    The command line prints it and ends with exit code 2.
    """


class NonFiniteError(RuntimeError):
    """Training met a loss or a gradient that is not a number. The command line prints the message and ends with code 1."""
