"""`lightning-distill fit`, `validate`, `test` and `predict`: LightningCLI for any method and data."""

import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.distributed.checkpoint.api import CheckpointException

import lightning_distill.sharding.strategies  # noqa: F401  # registers the names of the strategies
from lightning_distill.callbacks.checkpoint_io import verify_reads
from lightning_distill.callbacks.data_position import DataPosition
from lightning_distill.callbacks.optimizer_settings import OptimizerSettings
from lightning_distill.callbacks.predictions import WritePredictions
from lightning_distill.callbacks.random_state import RandomState
from lightning_distill.callbacks.sanity import StopOnNonFinite
from lightning_distill.callbacks.termination import EXIT_CODE, INTERRUPTED, JointTermination
from lightning_distill.commands import PROGRAM
from lightning_distill.commands.checkpoint_path import check_checkpoint, check_exists, find_checkpoint
from lightning_distill.commands.config_files import check_numbers
from lightning_distill.commands.config_paths import expand_paths
from lightning_distill.commands.cpu_processes import check_cpu_processes
from lightning_distill.commands.instantiation import constructor_error
from lightning_distill.commands.parser import DistillParser, NamedConfig
from lightning_distill.commands.process_errors import check_port, process_error
from lightning_distill.commands.resume_report import RecordSettings, check_resumable, differences, nothing_left
from lightning_distill.commands.run_context import RunDirectory
from lightning_distill.commands.run_directory import DEFAULT, choose_directory
from lightning_distill.commands.setting_names import with_full_names
from lightning_distill.commands.trained_settings import check_trained_settings
from lightning_distill.commands.trainer_settings import check_seed, check_trainer_settings
from lightning_distill.errors import ConfigurationError, RunError, find_configuration_error
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.methods.setup_checks import check_strategy_class
from lightning_distill.outputs import atomic_file

DEFAULT_CALLBACKS: tuple[type[Callback], ...] = (
    RandomState,
    OptimizerSettings,
    DataPosition,
    StopOnNonFinite,
    WritePredictions,
    JointTermination,
)
"""Callbacks of every trainer. Those in the settings come before the last, which may end the run after a step."""


class SaveConfig(SaveConfigCallback):
    """Saves the settings of `fit` to the run's directory when training begins.

    Args:
        parser: Parser of the settings.
        config: The settings.
        file: File to write, which does not exist; None writes nothing.
        message: Line about the directory, to print when training begins.
    """

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, file: Path | None, message: str | None = None
    ) -> None:
        super().__init__(parser, config)
        self.file = file
        self.message = message

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing: settings that are refused later would leave a file."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the settings, and print the message, before the first step."""
        if self.message is not None:
            rank_zero_info(self.message)
        if self.file is not None and trainer.is_global_zero:
            text = self.parser.dump(self.config, skip_none=False)
            with atomic_file(self.file) as file:
                file.write(text.encode())


class DistillCLI(LightningCLI):
    """LightningCLI with any method as model and any DataModule as data.

    Every trainer has `DEFAULT_CALLBACKS`, besides the callbacks in its settings.

    Args:
        args: Arguments without the program name; None means those of the process.
        run: Whether the arguments begin with a subcommand, to run it.

    Raises:
        ConfigurationError: If a setting is invalid.
    """

    _nothing_left: str | None = None
    """Why a resumed run has nothing to train, if it has not."""
    _directory: RunDirectory | None = None
    _directory_message: str | None = None

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        try:
            self._run(args, run)
        except ValueError as error:
            if (cause := find_configuration_error(error)) is None:
                raise
            full = with_full_names(str(cause), vars(self).get("config_dump", {}))
            raise (cause if full == str(cause) else ConfigurationError(full)) from error

    def _run(self, args: Sequence[str] | None, run: bool) -> None:
        """Parse the arguments, build the classes and run the subcommand."""
        known = self.subcommands()
        if run and args and args[0] in known:
            chosen = {args[0]: known[args[0]]}
            vars(self)["subcommands"] = lambda: chosen  # Lightning builds a parser for each of these
        with ExitStack() as self._contexts:
            super().__init__(
                LightningModule,
                LightningDataModule,
                save_config_callback=SaveConfig,
                save_config_kwargs={"file": None},
                trainer_defaults={"default_root_dir": DEFAULT},
                seed_everything_default=0,
                parser_class=DistillParser,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                run=run,
                args=None if args is None else list(args),
            )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Parser with interpolation across config files, named configs, and an error for duplicate keys."""
        kwargs.setdefault("prog", PROGRAM)
        parser = self.parser_class(parser_mode="omegaconf+", dump_header=[f"torch=={torch.__version__}"], **kwargs)
        parser.add_argument(
            "-c", "--config", action=NamedConfig, help="File or name of a shipped config. May be given several times."
        )
        return parser

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name, subparser in self._subcommand_parsers.items():
            subparser.prog = f"{PROGRAM} {name}"

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, without Lightning's warning about a call from Python."""
        self.config = parser.parse_args(args)
        expand_paths(self._settings)
        if self._is_training:
            self._directory_message = choose_directory(self._settings.trainer, self._settings.ckpt_path)
        self._dump_config()
        check_seed(self.config_dump["seed_everything"])
        check_trainer_settings(self.config_dump["trainer"])
        check_numbers(self.config_dump)

    @property
    def _settings(self) -> Namespace:
        return self.config[self.config.subcommand] if "subcommand" in self.config else self.config

    @property
    def _is_training(self) -> bool:
        """Whether this run trains, and writes what it has trained."""
        return self.config.get("subcommand") == "fit" and not self._settings.trainer.fast_dev_run

    def before_instantiate_classes(self) -> None:
        """Check that outputs can be written, and lock the run's directory."""
        if self._is_training:
            self._directory = self._contexts.enter_context(RunDirectory(self._settings.trainer))
            self.save_config_kwargs = {"file": self._directory.config_file, "message": self._directory_message}

    def instantiate_classes(self) -> None:
        """Build data, method and trainer.

        jsonargparse checks some values, such as those of dataclasses, only here, by a constructor that fails.

        Raises:
            ConfigurationError: If the types of the settings show what is wrong, or a constructor of another package fails.
        """
        try:
            super().instantiate_classes()
        except (TypeError, ValueError, ImportError, MisconfigurationException) as error:
            assert isinstance(self.parser, DistillParser)
            if find_configuration_error(error) is not None:
                raise
            if (fault := self.parser.first_fault() or constructor_error(error)) is None:
                raise
            raise ConfigurationError(fault) from error

    def _parse_ckpt_path(self) -> None:
        """Check that the checkpoint exists; Lightning's method would also replace the settings by those of the checkpoint."""
        path = self.config[self.config.subcommand].get("ckpt_path") if "subcommand" in self.config else None
        if path not in (None, "last", "best", "hpc"):
            check_exists(str(path), resumes=self.config.subcommand == "fit")

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        listed = config.get("callbacks") or []
        listed = listed if isinstance(listed, list) else [listed]
        defaults = [kind() for kind in DEFAULT_CALLBACKS if not any(isinstance(item, kind) for item in listed)]
        defaults.insert(0, RecordSettings(self.config_dump))
        config = {**config, "logger": self._loggers(config)}
        if self.subcommand == "fit" and not config["logger"] and any(isinstance(item, LearningRateMonitor) for item in listed):
            rank_zero_info("trainer.logger is false: removed the callback LearningRateMonitor, which needs a logger")
            listed = [item for item in listed if not isinstance(item, LearningRateMonitor)]
        try:
            trainer = super()._instantiate_trainer(
                {**config, "callbacks": [*defaults[:-1], *listed, *defaults[-1:]]}, callbacks
            )
        except (MisconfigurationException, TypeError, ValueError, RuntimeError, ImportError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise trainer_error(error, config) from error
        if isinstance(self.model, TeacherStudentBase):
            check_strategy_class(trainer.strategy)
        verify_reads(trainer)
        if self._directory is not None:
            self._directory.record_loggers(trainer.loggers)
        return trainer

    def _loggers(self, config: dict[str, Any]) -> list[Logger]:
        """Configured loggers; those that write to the run's directory are kept for `fit` only."""
        value, is_training = config.get("logger"), self.subcommand == "fit"
        if value in (None, True):
            value = is_training and TensorBoardLogger(
                config["default_root_dir"], name=None, version="", default_hp_metric=False
            )
        loggers = [] if value is False else value if isinstance(value, list) else [value]
        return [logger for logger in loggers if is_training or not isinstance(logger, TensorBoardLogger | CSVLogger)]

    def before_fit(self) -> None:
        """Check the port, and what `before_validate` checks."""
        check_port(self.trainer)
        self.before_validate()

    def before_validate(self) -> None:
        """Check the processes, and that the teacher's weights exist and are complete, before processes wait for each other."""
        check_cpu_processes(self.trainer)
        self.check_teacher()

    def check_teacher(self) -> None:
        """Check that the teacher's weights exist and are complete."""
        if isinstance(self.model, TeacherStudentBase):
            self.model.prepare_data()

    before_test = before_predict = before_validate

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if path := kwargs.get("ckpt_path"):
            path = kwargs["ckpt_path"] = find_checkpoint(str(path), self.trainer, resumes=subcommand == "fit")
            content = check_checkpoint(path, self.trainer, resumes=subcommand == "fit")
            if content is not None:
                self._compare_settings(content, path, resumes=subcommand == "fit")
        return kwargs

    def _compare_settings(self, checkpoint: dict[str, Any], path: str, resumes: bool) -> None:
        """Check and report settings that differ from those of the checkpoint; find out whether anything is left to train."""
        if not resumes:
            check_trained_settings(self.config_dump, checkpoint, path)
            return
        check_resumable(self.config_dump, checkpoint, path)
        self._nothing_left = nothing_left(self.trainer, checkpoint, path)
        if not self._nothing_left and (changed := differences(self.config_dump, checkpoint)):
            rank_zero_warn(f"checkpoint {path} has other settings; this run uses its own: {', '.join(changed)}")

    def fit(self, **kwargs: Any) -> None:
        """Train, unless the checkpoint has reached the last step already; then no model loads."""
        if self._nothing_left:
            rank_zero_warn(self._nothing_left)
        else:
            self.trainer.fit(**kwargs)


def main(arguments: Sequence[str], name: str) -> None:
    """Run `fit`, `validate`, `test` or `predict` with the arguments after its name."""
    try:
        DistillCLI([name, *arguments])
    except SIGTERMException as signal:
        # Lightning raises it without a code. The process would exit with 0, as after a complete run.
        sys.exit(EXIT_CODE if signal.code is None else signal.code)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # before or after training; Lightning's code is 1
            sys.exit(INTERRUPTED)
        raise
    except (RuntimeError, CheckpointException) as error:
        if isinstance(error, RunError) or (lost := process_error(error)) is None:
            raise
        raise lost from error


def trainer_error(error: Exception, config: dict[str, Any]) -> ConfigurationError:
    """One-line form of an error that the trainer's constructor raised.

    Args:
        error: Error of the constructor.
        config: Settings of the trainer.
    """
    reason = " ".join(str(error).split()).rstrip("!.")
    for name in (each for each in config if "_" in each):
        reason = re.sub(rf"(?<![\w.]){name}(?!\w)", f"trainer.{name}", reason)
    remedy = "correct them"
    if config["accelerator"] not in ("auto", "cpu"):
        remedy = f"trainer.accelerator is {config['accelerator']!r}; set it to 'auto' or 'cpu' to run without a GPU"
    return ConfigurationError(f"the settings of the trainer are invalid, or unsupported on this machine ({reason}); {remedy}")
