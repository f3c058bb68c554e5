import errno
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_distill import __version__
from lightning_distill.commands import main as entry
from lightning_distill.commands import training
from lightning_distill.commands.main import SUBCOMMANDS, main
from lightning_distill.errors import NonFiniteError, StorageError

ROOT = Path(__file__).parents[2]
NAMES = ("fit", "validate", "test", "predict", "sample", "export", "precompute", "plan")
HELP_IN_PROCESS = """
import sys
from lightning_distill.commands.main import main
try:
    main(["--help"])
finally:
    print("modules:", *sorted({"torch", "lightning", "diffusers", "transformers", "jsonargparse"} & sys.modules.keys()))
"""


def exit_code(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return end.value.code


def test_help_has_one_line_per_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    lines = output.splitlines()
    assert lines[0].startswith("usage: lightning-distill SUBCOMMAND")
    first = lines.index("subcommands:") + 1
    rows = [line.split(maxsplit=1) for line in lines[first : first + len(NAMES)]]
    assert rows == [[name, SUBCOMMANDS[name].help] for name in NAMES]
    assert all(len(line) <= 80 for line in lines)
    assert exit_code("-h") == 0
    assert capsys.readouterr().out == output


@pytest.mark.parametrize("command", [["-c", HELP_IN_PROCESS], ["-m", "lightning_distill", "--help"]])
def test_help_imports_no_framework(command: list[str]) -> None:
    process = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.startswith("usage: lightning-distill ")
    assert process.stderr == ""
    if command[0] == "-c":
        assert process.stdout.splitlines()[-1] == "modules:"


def test_the_console_script_is_main() -> None:
    assert f'\nlightning-distill = "{main.__module__}:main"\n' in (ROOT / "pyproject.toml").read_text()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"lightning-distill {__version__}\n"


def test_no_arguments_print_the_usage_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code() == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("usage: lightning-distill SUBCOMMAND")


@pytest.mark.parametrize(
    ("mistyped", "hint"), [("exprot", "did you mean 'export'? "), ("fitt", "did you mean 'fit'? "), ("x", "")]
)
def test_a_mistyped_subcommand(capsys: pytest.CaptureFixture[str], mistyped: str, hint: str) -> None:
    assert exit_code(mistyped, "--config", "shapes_meanflow.yaml") == 2
    errors = capsys.readouterr().err
    assert errors == f"error: {mistyped!r} is not a subcommand; {hint}choose one of {', '.join(NAMES)}\n"


def test_main_takes_the_arguments_of_the_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-distill", "exprot"])
    with pytest.raises(SystemExit):
        main()
    assert "'exprot' is not a subcommand" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_usage_of_every_subcommand_has_the_program_name(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert exit_code(name, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: lightning-distill {name} ")


@pytest.mark.parametrize("name", NAMES)
def test_a_subcommand_runs_in_its_module(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls = []
    module = types.ModuleType("stand_in")
    module.main = lambda arguments, name: calls.append((arguments, name))
    monkeypatch.setitem(sys.modules, f"lightning_distill.commands.{SUBCOMMANDS[name].module}", module)
    main([name, "--nfe", "4"])
    assert calls == [(["--nfe", "4"], name)]


def test_every_module_of_the_table_has_a_main() -> None:
    for subcommand in SUBCOMMANDS.values():
        assert callable(import_module(f"{entry.__package__}.{subcommand.module}").main)


@pytest.mark.parametrize("code", [None, 0, 143])
def test_sigterm_during_training_sets_the_exit_code(monkeypatch: pytest.MonkeyPatch, code: int | None) -> None:
    def terminate(arguments: list[str]) -> None:
        raise SIGTERMException(*([] if code is None else [code]))

    monkeypatch.setattr(training, "DistillCLI", terminate)
    assert exit_code("fit") == (143 if code is None else code)


def test_non_finite_errors_exit_with_code_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(arguments: list[str]) -> None:
        raise NonFiniteError("the loss is NaN")

    monkeypatch.setattr(training, "DistillCLI", diverge)
    assert exit_code("fit") == 1
    assert capsys.readouterr().err == "error: the loss is NaN\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a"),
            "no space left on the disk of 'runs/a'; free some space, or",
        ),
        (StorageError("no space left on the disk of 'b'"), "no space left on the disk of 'b'"),
    ],
)
def test_full_disks_exit_with_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def fail(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr(training, "DistillCLI", fail)
    assert exit_code("fit") == 1
    assert capsys.readouterr().err.startswith(f"error: {line}")


def test_other_errors_of_the_system_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: list[str]) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "a")

    monkeypatch.setattr(training, "DistillCLI", fail)
    with pytest.raises(FileNotFoundError):
        main(["fit"])


def test_modules_of_the_working_directory_are_found_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert exit_code("nosuch") == 2
    assert exit_code("fit", "--help") == 0
    assert exit_code("fit", "--help") == 0
    assert sys.path.count(str(tmp_path)) == 1
    assert sys.path[-1] == str(tmp_path)
