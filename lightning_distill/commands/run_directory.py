"""The directory of a run: one run is one directory, which no other run writes to.

`fit` continues the run in `trainer.default_root_dir` with a checkpoint of it. Without one it starts a new run, in the next
numbered directory if that one has a run.
"""

import glob
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import Namespace
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_distill.commands.run_lock import SETTING, in_use_error, user_of
from lightning_distill.errors import ConfigurationError
from lightning_distill.paths import expand_path
from lightning_distill.sharding.checkpoint_files import local_path

DEFAULT = "runs/run"
"""Directory of a run without the setting `trainer.default_root_dir`."""
CHOSEN = "LIGHTNING_DISTILL_RUN_DIRECTORY"
"""Environment variable for the processes that Lightning starts: id of the first process, a colon, and its directory."""
MARKS = (
    "*.ckpt",
    "checkpoints/*.ckpt",
    "events.out.tfevents.*",
    "metrics.csv",
    "summary.json",
    "export.json",
    "*/export.json",
    "lightning_logs",
)
"""Files by which a directory has a run."""
_REQUEUED = "hpc_ckpt_*.ckpt"  # Lightning saves it before SLURM requeues a job, and resumes from it without `--ckpt_path`


class Output(NamedTuple):
    """An output directory in the settings of the trainer.

    Attributes:
        setting: Its name, such as "AtomicCheckpoint.dirpath".
        path: The directory.
    """

    setting: str
    path: Path


def chosen_directory() -> str | None:
    """Directory that the parent process has chosen, in a process that Lightning has started; None in others.

    A user's shell may have the variable from elsewhere.
    """
    parent, _, directory = os.environ.get(CHOSEN, "").partition(":")
    return directory if "LOCAL_RANK" in os.environ and parent == str(os.getppid()) else None


def choose_directory(trainer: Namespace, ckpt_path: str | None) -> str | None:
    """Choose the directory of a run, and set the paths in the settings of the trainer that lie in another one.

    Args:
        trainer: Settings of the trainer, which are changed.
        ckpt_path: Checkpoint that the run resumes from.

    Returns:
        Message about a directory other than that of the setting, to print when the run begins; None if there is none.

    Raises:
        ConfigurationError: If the directory has a run, or is in use, and this process cannot choose another one. Also if
            another output directory has a run.
    """
    trainer.default_root_dir = str(trainer.default_root_dir or DEFAULT)
    _move(trainer, expand_path(trainer.default_root_dir, SETTING))
    for part in _parts(trainer):
        for name in _output_names(part):
            part.init_args[name] = expand_path(part.init_args[name], f"{_class_name(part)}.{name}")
    root = Path(trainer.default_root_dir)
    ckpt_path = ckpt_path and expand_path(str(ckpt_path), "ckpt_path")
    if (chosen := chosen_directory()) is not None:
        _move(trainer, chosen)
        return None
    outputs = output_directories(trainer)
    if ckpt_path == "last" and (later := _latest_run(root)) is not None:
        rank_zero_warn(
            f"ckpt_path last continues the run in {str(root)!r}; set {SETTING} to {str(later)!r} to continue that later run"
        )
    if (
        is_remote(trainer.default_root_dir)
        or _continues(ckpt_path, [Output(SETTING, root), *outputs])
        or any(root.glob(_REQUEUED))
    ):
        return None
    inside = [path for _, path in outputs if _is_inside(path, root)]
    for setting, path in outputs:
        if path not in inside and has_run(path):
            raise ConfigurationError(
                f"{setting} is {str(path)!r}, which has files of another run; set it to another directory, or continue that "
                "run with --ckpt_path"
            )
    earlier = _numbered_run(ckpt_path, root)
    if earlier is not None:
        _move(trainer, str(earlier))
        return f"{SETTING} is {str(earlier)!r}, the directory of the checkpoint"
    if not any(map(has_run, [root, *inside])):
        return None
    if user := user_of(root):
        raise in_use_error(root, user)
    if _started_by_a_launcher(trainer) or not root.absolute().name:  # which / has not
        raise ConfigurationError(
            f"{SETTING} is {str(root)!r}, which has a run; continue that run with --ckpt_path last, or set {SETTING} to "
            "another directory"
        )
    absolute = root.absolute()
    numbered = (absolute.with_name(f"{absolute.name}-{n}") for n in count(2))
    free = next(path for path in numbered if not os.path.lexists(path))
    target = free if root.is_absolute() or not root.name else root.with_name(free.name)
    _move(trainer, str(target))
    return (
        f"{SETTING} is {str(root)!r}, which has a run; this run writes to {str(target)!r}. Add --ckpt_path last to "
        "continue the other one"
    )


def output_directories(trainer: Namespace) -> list[Output]:
    """Output directories in the settings of the trainer's callbacks, loggers and profiler."""
    return [
        Output(f"{_class_name(part)}.{name}", Path(part.init_args[name]))
        for part in _parts(trainer)
        for name in _output_names(part)
        if _class_name(part) != "WritePredictions"  # which `predict` writes, and checks
    ]


def has_run(directory: Path) -> bool:
    """Whether a directory has files of a run."""
    return any(next(directory.glob(mark), None) is not None for mark in MARKS)


def _parts(trainer: Namespace) -> Iterator[Namespace]:
    """Settings of the objects of the trainer that write files."""
    for name in ("callbacks", "logger", "profiler"):
        value = trainer.get(name)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Namespace) and "class_path" in part:
                yield part


def _class_name(part: Namespace) -> str:
    return str(part.class_path).rpartition(".")[2]


def _output_names(part: Namespace) -> list[str]:
    """Names of the arguments of an object that are local output directories."""
    names = ("dirpath", "directory", "save_dir", "root_dir", "log_dir")
    values = part.get("init_args") or Namespace()
    return [name for name in names if isinstance(value := values.get(name), str) and not is_remote(value)]


def _move(trainer: Namespace, chosen: str) -> None:
    """Set the run's directory, and replace it in all paths in the settings of the trainer."""
    for part in _parts(trainer):
        if "init_args" in part:
            part.init_args = _moved(part.init_args, str(trainer.default_root_dir), chosen)
    trainer.default_root_dir = chosen


def _moved(value: Any, root: str, chosen: str) -> Any:
    if isinstance(value, Namespace):
        return Namespace(**{name: _moved(each, root, chosen) for name, each in vars(value).items()})
    if isinstance(value, dict):
        return {name: _moved(each, root, chosen) for name, each in value.items()}
    if isinstance(value, list):
        return [_moved(each, root, chosen) for each in value]
    if isinstance(value, str):
        # Other strings may be no paths, so that they are compared as text.
        for text, place in ((value, root), (os.path.normpath(value), os.path.normpath(root)), (value, os.path.abspath(root))):
            if text == place or text.startswith(f"{place}/"):
                return f"{chosen}{text.removeprefix(place)}"
    return value


def _continues(ckpt_path: str | None, outputs: list[Output]) -> bool:
    """Whether a checkpoint is one of the run in these directories."""
    if ckpt_path in (None, "last", "best", "hpc"):
        return ckpt_path is not None
    local = local_path(ckpt_path)
    return local is not None and any(_is_inside(local, path) for _, path in outputs)


def _numbered_run(ckpt_path: str | None, root: Path) -> Path | None:
    """The numbered directory of the same name that a checkpoint lies in, such as `runs/demo-2` for `runs/demo`."""
    local = None if ckpt_path is None else local_path(ckpt_path)
    for parent in () if local is None else local.absolute().parents:
        if _number(parent, root) is not None:
            return parent if root.is_absolute() else root.with_name(parent.name)
    return None


def _latest_run(root: Path) -> Path | None:
    """The run with the highest number beside a directory."""
    found = {_number(path, root) or 0: path for path in root.parent.glob(f"{glob.escape(root.name)}-*") if has_run(path)}
    number = max(found, default=0)
    return found[number] if number else None


def _number(directory: Path, root: Path) -> int | None:
    """Number of a numbered directory, such as 2 of `runs/demo-2` for `runs/demo`; None for others."""
    name, _, number = directory.name.rpartition("-")
    is_numbered = name == root.absolute().name and directory.absolute().parent == root.absolute().parent and number.isdecimal()
    return int(number) if is_numbered else None


def _is_inside(path: Path, directory: Path) -> bool:
    return any(
        inner.is_relative_to(outer)
        for inner, outer in ((path.absolute(), directory.absolute()), (path.resolve(), directory.resolve()))
    )


def is_remote(path: str) -> bool:
    """Whether a path is a URL of remote storage."""
    return "://" in path


def _started_by_a_launcher(trainer: Namespace) -> bool:
    """Whether processes of this run start independently of each other, so that each would choose for itself."""
    if SLURMEnvironment.detect():
        return int(os.environ["SLURM_NTASKS"]) > 1
    return trainer.num_nodes > 1 or ("LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1)
