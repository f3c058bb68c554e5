"""Entry point of `lightning-distill`: the table of subcommands, their dispatch, and exit codes.

Imports neither torch nor a subcommand, so that `--help` and `--version` return at once.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

from lightning_distill import __version__
from lightning_distill.commands import PROGRAM
from lightning_distill.errors import RunError, find_configuration_error
from lightning_distill.outputs import storage_error
from lightning_distill.suggestions import nearest


class Subcommand(NamedTuple):
    """Row of the table of subcommands.

    Attributes:
        module: Module in this package. Its `main(arguments, name)` runs the subcommand.
        help: Line in the output of `--help`.
    """

    module: str
    help: str


SUBCOMMANDS = {
    "fit": Subcommand("training", "train a model"),
    "validate": Subcommand("training", "evaluate a model on the validation data"),
    "test": Subcommand("training", "evaluate a model on the test data"),
    "predict": Subcommand("training", "generate an image for every prompt of the data"),
    "sample": Subcommand("sample", "generate images with a pipeline or an export"),
    "export": Subcommand("export", "export the student of a checkpoint for other tools"),
    "precompute": Subcommand("precompute", "encode images and prompts once, before training"),
    "plan": Subcommand("plan", "estimate the GPU memory of a training run"),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run one subcommand.

    Args:
        args: Arguments without the program name; None means those of the process.

    Raises:
        SystemExit: With code 2 for a `ConfigurationError`, 1 for a `RunError`, 128 and its number after a signal, and 0 after
            `--help` or `--version`. An error is one line on stderr.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    module = _module(arguments)
    _find_modules_of_the_user()
    _ignore_known_warnings()
    try:
        import_module(f"{__package__}.{module}").main(arguments[1:], arguments[0])
    except ValueError as error:
        if (cause := find_configuration_error(error)) is None:
            raise
        _exit(str(cause), 2)
    except RunError as error:
        _exit(str(error), 1)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except OSError as error:
        if (failed := storage_error(error)) is None:
            raise
        _exit(str(failed), 1)


def _module(arguments: Sequence[str]) -> str:
    """Module that runs the arguments. Exits if they name no subcommand."""
    if not arguments:
        sys.stderr.write(_usage())
        sys.exit(2)
    name = arguments[0]
    if name in SUBCOMMANDS:
        return SUBCOMMANDS[name].module
    if name in ("-h", "--help", "--version"):
        sys.stdout.write(f"{PROGRAM} {__version__}\n" if name == "--version" else _usage())
        sys.exit(0)
    if name.startswith("-"):
        return "training"  # LightningCLI accepts options before its subcommands, as in `--config FILE fit`
    near = nearest(name, SUBCOMMANDS)
    hint = f"did you mean {near!r}? " if near else ""
    _exit(f"{name!r} is not a subcommand; {hint}choose one of {', '.join(SUBCOMMANDS)}", 2)


def _usage() -> str:
    width = max(map(len, SUBCOMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {subcommand.help}" for name, subcommand in SUBCOMMANDS.items())
    return f"""\
usage: {PROGRAM} SUBCOMMAND [OPTION ...]
       {PROGRAM} --help | --version

Few-step distillation of text-to-image flow models, on PyTorch Lightning.

subcommands:
{rows}

`{PROGRAM} SUBCOMMAND --help` lists the options of a subcommand.
"""


def _find_modules_of_the_user() -> None:
    """Let settings name classes of modules in the working directory, as with `python -m`.

    The directory comes last: a folder `datasets` in it hides no package.
    """
    if not {"", os.getcwd()} & set(sys.path) and not getattr(sys.flags, "safe_path", False):  # Python 3.10 has no such flag
        sys.path.append(os.getcwd())


def _ignore_known_warnings() -> None:
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")  # Lightning, in every fit
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # teachers and encoders stay in eval mode
    warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")  # the only argument name in diffusers 0.41
    # Under manual optimization too, checkpoints contain the state after the step.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")


def _exit(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)
