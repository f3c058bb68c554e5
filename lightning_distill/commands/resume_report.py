"""Settings in checkpoints, and what a resumed run changes of them, before a model loads."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_distill.errors import ConfigurationError

SETTINGS = "settings"
"""Key of the settings in a checkpoint."""
GROUPS = ("model", "data", "trainer", "seed_everything")
UNSET = "unset"

IRRELEVANT = {
    "data.num_workers",
    *(
        f"trainer.{name}"
        for name in (
            # Where output goes, and what is shown.
            "default_root_dir",
            "enable_checkpointing",
            "enable_model_summary",
            "enable_progress_bar",
            "log_every_n_steps",
            "logger",
            "profiler",
            # A run is resumed to train longer.
            "max_epochs",
            "max_steps",
            "max_time",
            "min_epochs",
            "min_steps",
            # Before the first step.
            "num_sanity_val_steps",
        )
    ),
}
"""Settings that may change at a resume without a warning: they change no step of a training."""
OUTPUT_NAMES = ("dirpath", "directory", "filename")
"""Settings of callbacks that name their output."""


class Change(NamedTuple):
    """A setting that differs from that of a checkpoint.

    Attributes:
        name: Its dotted name.
        value: Its value in this run, as text.
        saved: Its value in the checkpoint, as text.
    """

    name: str
    value: str
    saved: str


class RecordSettings(Callback):
    """Saves the settings of a run in its checkpoints; those of a resumed run count.

    Args:
        settings: Settings of the command line, as plain values; the logger's are left out.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = {name: settings[name] for name in GROUPS if name in settings}
        self.settings["trainer"] = {k: v for k, v in self.settings.get("trainer", {}).items() if k != "logger"}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the settings."""
        checkpoint[SETTINGS] = self.settings

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the configured patience of `EarlyStopping`, which Lightning would take from the checkpoint."""
        for callback in trainer.early_stopping_callbacks:
            if (state := checkpoint.get("callbacks", {}).get(callback.state_key)) is not None:
                state["patience"] = callback.patience


def check_resumable(settings: Mapping[str, Any], checkpoint: Mapping[str, Any], path: str) -> None:
    """Check the settings that have to equal those of the checkpoint, without which its states do not fit.

    Args:
        settings: Settings of this run.
        checkpoint: The checkpoint.
        path: Its path, for the message.

    Raises:
        ConfigurationError: If the LoRA rank or the class of the optimizer differs, or the state of the schedule is missing.
    """
    if SETTINGS not in checkpoint:
        return
    new, old = named_values(settings), named_values(checkpoint[SETTINGS])
    name = "model.student.lora.rank"
    if name in new and name in old and new[name] != old[name]:
        raise ConfigurationError(
            f"{name} is {new[name]}, and ckpt_path {path!r} has weights of rank {old[name]}; set it to {old[name]}, or start a "
            "new run"
        )
    name = "model.optimizer"
    if name in new and name in old and new[name] != old[name]:
        raise ConfigurationError(
            f"{name} is {new[name]}, and ckpt_path {path!r} has the states of {old[name]}; set it to {old[name]}, or export "
            "the student and start a new run with it as model.student.pretrained"
        )
    name = "model.lr_scheduler"
    if old.get(name) is not None and not checkpoint.get("lr_schedulers", True):
        raise ConfigurationError(
            f"ckpt_path {path!r} was trained with {name} {old[name]}, and its lr_schedulers are empty; fit resumes only from a "
            "full checkpoint: set ckpt_path to one"
        )


def differences(settings: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> list[str]:
    """Texts of the settings that differ from those of a checkpoint, sorted by name; all but irrelevant ones."""
    return [
        f"{name} {value} (checkpoint: {saved}{', whose random numbers continue' if name == 'seed_everything' else ''})"
        for name, value, saved in changed_settings(settings, checkpoint)
    ]


def changed_settings(
    settings: Mapping[str, Any], checkpoint: Mapping[str, Any], groups: Sequence[str] = GROUPS
) -> list[Change]:
    """Settings that differ from those of a checkpoint, sorted by name; all but irrelevant ones.

    The settings of a class are left out if the class itself differs. A checkpoint that the command line has not written has no
    settings, and no differences.

    Args:
        settings: Settings of this run.
        checkpoint: The checkpoint.
        groups: The groups to compare, some of `GROUPS`.
    """
    if SETTINGS not in checkpoint:
        return []
    new, old = named_values(settings, groups), named_values(checkpoint[SETTINGS], groups)
    found: list[Change] = []
    classes: list[str] = []
    for name in sorted(new.keys() | old.keys()):
        if new.get(name, UNSET) == old.get(name, UNSET) or name.startswith(tuple(classes)):
            continue
        if _is_class(new, name) or _is_class(old, name):
            classes.append(f"{name}.")
        found.append(Change(name, _text(new, name), _text(old, name)))
    return found


def nothing_left(trainer: Trainer, checkpoint: Mapping[str, Any], path: str) -> str | None:
    """Text that says why a resumed run has nothing to train, or None if it has."""
    step = int(checkpoint["global_step"])
    epochs = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("current", {}).get("processed", 0)
    for name, limit, reached in (("max_steps", trainer.max_steps, step), ("max_epochs", trainer.max_epochs, epochs)):
        if limit is not None and limit != -1 and reached >= limit:
            return (
                f"trainer.{name} is {limit}, and checkpoint {path} has reached {reached}: nothing is left to train; raise it "
                "to train further, or use `export` for the student"
            )
    return None


def named_values(settings: Mapping[str, Any], groups: Sequence[str] = GROUPS) -> dict[str, Any]:
    """Values by the dotted names that users write, without irrelevant ones; the name of a class has its path.

    Callbacks are named by their classes, so that their order does not matter. A path below `trainer.default_root_dir` is
    relative to it.
    """
    root = settings.get("trainer", {}).get("default_root_dir")
    found: dict[str, Any] = {}
    for name in groups:
        for path, value in _leaves(settings.get(name), name):
            output = path.startswith("trainer.callbacks.") and path.rpartition(".")[2] in OUTPUT_NAMES
            if output or any(path == each or path.startswith(f"{each}.") for each in IRRELEVANT):
                continue
            if root and isinstance(value, str) and value.startswith(f"{root}/"):
                value = f"${{trainer.default_root_dir}}{value.removeprefix(str(root))}"
            found[path] = value
    return found


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and "class_path" in value:
        yield path, value["class_path"]
        for arguments in (value.get("init_args"), value.get("dict_kwargs")):
            if arguments:
                yield from _leaves(arguments, path)
    elif isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif path == "trainer.callbacks":
        counts: dict[str, int] = {}
        for item in value if isinstance(value, list) else [value] if value else []:
            name = str(item["class_path"]).rpartition(".")[2]
            counts[name] = counts.get(name, 0) + 1
            yield from _leaves(item, f"{path}.{name}" + (f"#{counts[name]}" if counts[name] > 1 else ""))
    else:
        yield path, value


def _is_class(values: Mapping[str, Any], name: str) -> bool:
    return any(each.startswith(f"{name}.") for each in values)


def _text(values: Mapping[str, Any], name: str) -> str:
    """Value of a setting, or values of the settings below it where it has none of its own."""
    if name in values or not _is_class(values, name):
        return _shown(values.get(name, UNSET))
    inner = {each.removeprefix(f"{name}."): value for each, value in values.items() if each.startswith(f"{name}.")}
    return "{" + ", ".join(f"{each}: {_shown(value)}" for each, value in inner.items()) + "}"


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
