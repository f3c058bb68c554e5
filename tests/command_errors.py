"""Errors of the command line, for tests."""

import pytest

from lightning_distill.commands.main import main


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command with a wrong setting prints; fails if it prints a traceback or more lines."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    line = errors[errors.index("error: ") :]
    assert line.count("\n") == 1
    return line
