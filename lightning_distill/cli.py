"""The command line: a thin LightningCLI, `python -m lightning_distill fit`, and commands around it."""

import os
import pickle
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import ActionConfigFile, set_parsing_settings
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

import lightning_distill.callbacks
import lightning_distill.callbacks.checkpoint
import lightning_distill.data
import lightning_distill.methods
import lightning_distill.models
import lightning_distill.strategies  # noqa: F401  # these are imported so that short class names resolve in configs
from lightning_distill.callbacks.optimizer_settings import OptimizerSettings
from lightning_distill.callbacks.predictions import WritePredictions
from lightning_distill.callbacks.random_state import RandomState
from lightning_distill.callbacks.sanity import StopOnNonFinite
from lightning_distill.callbacks.termination import EXIT_CODE, JointTermination
from lightning_distill.checkpoint_export import CheckpointExport, export_checkpoint
from lightning_distill.configuration import config_chain, flatten, refuse_bad_learning_rates, without_base
from lightning_distill.errors import ConfigurationError, NonFiniteError
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.models.sharding import Sharding
from lightning_distill.planning import PlanOptions, plan
from lightning_distill.precompute import PrecomputeOptions, precompute
from lightning_distill.strategies.sharded_checkpoint import REST

ALWAYS: tuple[type[Callback], ...] = (RandomState, OptimizerSettings, StopOnNonFinite, JointTermination, WritePredictions)


class NamedConfig(ActionConfigFile):
    """`--config NAME`: a file, else a shipped config, after the files it names under `base`."""

    @staticmethod
    def apply_config(parser: Any, cfg: Any, dest: str, value: Any) -> None:
        """Read the files in turn; settings written in place of a file name go to jsonargparse as they are."""
        text = str(value)
        written_out = "\n" in text or text.lstrip().startswith("{")
        for part in [value] if written_out else config_chain(text):
            ActionConfigFile.apply_config(parser, cfg, dest, part if written_out else str(part))


class DistillParser(LightningArgumentParser):
    """Parser of configs with a `base`, whose errors leave out the usage, which is pages long here."""

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        """Parse the settings of one file."""
        return super().parse_string(without_base(content), *args, **kwargs)

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Parse the arguments.

        jsonargparse reads the value of `--model.student.lora=null` and hands it to the parser of the class as text, which
        would then be `None`.
        """
        if getattr(self, "_inner_parser", False) and args is not None:
            args = [f"{arg.removesuffix('=None')}=null" if arg.endswith("=None") else arg for arg in args]
        return super().parse_args(args, *rest, **kwargs)

    def _check_value_key(self, action: Any, value: Any, key: str, cfg: Any, append: bool = False) -> Any:
        """Let a value be that is only known when interpolations are resolved.

        Where a later file changes a class, jsonargparse drops what does not fit the new one, without a word, and looks at
        earlier values as if `${trainer.max_steps}` were meant as it stands.
        """
        try:
            return super()._check_value_key(action, value, key, cfg, append)
        except (TypeError, ValueError):
            if "${" in str(value):
                return value
            raise

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and end with exit code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, f"error: {_configuration_error(ex) or _one_sentence(message)}\n")
        raise AssertionError("unreachable")


class SaveConfig(SaveConfigCallback):
    """Writes the settings of a `fit` into its logger's directory, and nothing where there is no logger."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save `config.yaml`; one from an earlier run into the same directory is replaced."""
        if stage == "fit" and trainer.loggers:
            super().setup(trainer, pl_module, stage)


class DistillCLI(LightningCLI):
    """LightningCLI with any method for the model and any DataModule for the data.

    Every run gets the callbacks of `ALWAYS`, unless its settings list them already.

    Args:
        args: Arguments without the program's name; None takes those of the process.
        run: Whether the first of them is a command, which is then run.

    Raises:
        ConfigurationError: If a setting cannot work.
    """

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_class=DistillParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            run=run,
            args=None if args is None else list(args),
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser with interpolation across config files, `--config` by name, and no duplicate keys."""
        kwargs.setdefault(
            "description",
            "Few-step distillation; `--help` of `plan`, `precompute`, `export` and `sample` tells of four more commands: what "
            "a training asks of a machine, latents and embeddings written once, a checkpoint as a pipeline, and pictures.",
        )
        parser = self.parser_class(parser_mode="omegaconf+", dump_header=[f"torch=={torch.__version__}"], **kwargs)
        parser.add_argument("-c", "--config", action=NamedConfig, help="File, or name of a shipped config; may be repeated.")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, without Lightning's warning about arguments given from Python."""
        self.config = parser.parse_args(args)
        self._dump_config()
        refuse_bad_learning_rates(self.config_dump)

    def _parse_ckpt_path(self) -> None:
        """Refuse a checkpoint that is not there; Lightning would also put its settings in place of this run's."""
        if "subcommand" not in self.config:
            return
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and path not in ("last", "best", "hpc") and "://" not in str(path) and not Path(path).exists():
            raise ConfigurationError(
                f"ckpt_path {str(path)!r} does not exist; give an existing checkpoint or leave ckpt_path out"
            )

    def _report_differences(self, path: Path) -> None:
        """Say in one warning where the checkpoint's model settings differ from this run's."""
        saved = _saved_settings(path)
        model = self.config_dump["model"]
        given = flatten({"class_path": model["class_path"], **model.get("init_args", {}), **model.get("dict_kwargs", {})})
        differing = [
            f"{name} {given.get(name, 'unset')} (checkpoint: {saved.get(name, 'unset')})"
            for name in sorted(saved.keys() | given.keys())
            if saved and saved.get(name) != given.get(name)
        ]
        if differing:
            rank_zero_warn(f"checkpoint {path} was saved under other settings; this run keeps its own: {', '.join(differing)}")

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        listed = config.get("callbacks") or []
        listed = listed if isinstance(listed, list) else [listed]
        always = [kind() for kind in ALWAYS if not any(isinstance(item, kind) for item in listed)]
        if config.get("logger") is False and any(isinstance(item, LearningRateMonitor) for item in listed):
            rank_zero_info("trainer.logger is false, so LearningRateMonitor, which only logs, is left out")
            listed = [item for item in listed if not isinstance(item, LearningRateMonitor)]
        if config.get("val_check_interval") == 0:
            raise ConfigurationError(
                "trainer.val_check_interval is 0; give a number of steps of at least 1, or trainer.limit_val_batches 0 for none"
            )
        try:
            return super()._instantiate_trainer({**config, "callbacks": [*always, *listed]}, callbacks)
        except (MisconfigurationException, ValueError, RuntimeError, ImportError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise _unfit(error, config) from error

    def before_fit(self) -> None:
        """Look for the weights before processes wait for each other, and at how many threads these would have."""
        warn_of_busy_threads(self.trainer)
        if isinstance(self.model, TeacherStudentBase):
            self.model.prepare_data()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        path = kwargs.get("ckpt_path")
        if path == "best":
            raise ConfigurationError("ckpt_path 'best' is only known to the process that trained; give the checkpoint's file")
        if path == "last":
            path = kwargs["ckpt_path"] = _last_checkpoint(self.trainer)
        if path and Path(path).is_dir() and not isinstance(self.trainer.strategy, Sharding):
            raise ConfigurationError(
                f"ckpt_path {str(path)!r} is a directory, of a strategy that spreads networks; set trainer.strategy to that, "
                "or make a pipeline of it by export"
            )
        if path and (file := Path(path) / REST if Path(path).is_dir() else Path(path)).is_file():
            self._report_differences(file)
        return kwargs


class PrecomputeCLI(DistillCLI):
    """`precompute`: the settings of a training, and what to write of its data before it.

    Of the trainer `accelerator`, `devices`, `num_nodes` and `precision` count.

    Args:
        args: Arguments after `precompute`.

    Raises:
        ConfigurationError: If a setting cannot work.
    """

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(args, run=False)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser of a training's settings, under this command's name."""
        description = "Write the latents and prompt embeddings that a training asks for, once; an interrupted run goes on."
        return super().init_parser(prog="lightning_distill precompute", description=description, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Those of the command itself."""
        parser.add_class_arguments(PrecomputeOptions)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """In the place of a trainer, what shares the work among devices."""
        config = self._get(self.config_init, "trainer")
        settings = {name: config[name] for name in ("accelerator", "devices", "num_nodes", "precision")}
        try:
            return Fabric(**settings)
        except (RuntimeError, MisconfigurationException) as error:
            raise _unfit(error, settings) from error

    def after_instantiate_classes(self) -> None:
        """Run the command."""
        options = PrecomputeOptions(**{field.name: self.config[field.name] for field in fields(PrecomputeOptions)})
        fabric: Any = self.trainer
        precompute(self.model, self.datamodule, options, fabric)


class ExportCLI(DistillCLI):
    """`export`: the settings of a training, and which of its checkpoints to write where.

    Of the trainer nothing counts: one process does it on the CPU.

    Args:
        args: Arguments after `export`.

    Raises:
        ConfigurationError: If a setting cannot work.
    """

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(args, run=False)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser of a training's settings, under this command's name."""
        description = "Write the student of a checkpoint, of one file or of a sharded run, as a pipeline directory."
        return super().init_parser(prog="lightning_distill export", description=description, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Those of the command itself."""
        parser.add_class_arguments(CheckpointExport)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None."""
        return None

    def after_instantiate_classes(self) -> None:
        """Run the command."""
        options = {field.name: self.config[field.name] for field in fields(CheckpointExport)}
        export_checkpoint(self.model, CheckpointExport(**options))


class PlanCLI(DistillCLI):
    """`plan`: the settings of a training, and the machine that it is to run on.

    Args:
        args: Arguments after `plan`.

    Raises:
        ConfigurationError: If a setting cannot work.
    """

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(args, run=False)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser of a training's settings, under this command's name."""
        description = "Count what a training would take of each GPU, and which machine is large enough; nothing is loaded."
        return super().init_parser(prog="lightning_distill plan", description=description, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Those of the command itself."""
        parser.add_class_arguments(PlanOptions)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """In the place of a trainer, its settings: the machine that it is for need not be this one."""
        return self._get(self.config_init, "trainer")

    def after_instantiate_classes(self) -> None:
        """Run the command."""
        options = PlanOptions(**{field.name: self.config[field.name] for field in fields(PlanOptions)})
        settings: Any = self.trainer
        plan(self.model, self.datamodule, settings, options)


def _unfit(error: Exception, config: dict[str, Any]) -> ConfigurationError:
    reason = " ".join(str(error).split()).rstrip("!.")
    remedy = "correct them"
    if config["accelerator"] not in ("auto", "cpu"):
        remedy = f"trainer.accelerator is {config['accelerator']!r}, and 'auto' or 'cpu' runs without a GPU"
    return ConfigurationError(f"the trainer does not go with this machine or its settings ({reason}); {remedy}")


def _one_sentence(message: str) -> str:
    """What jsonargparse says of a setting in a class, whose lines list all that the setting could be, in one sentence."""
    place = re.match(r'Parser key "(?P<key>[^"]+)":', message)
    unknown = re.findall(r"Problem with given class_path '([^']+)':\s+Option '([^']+)' is not accepted", message)
    wrong = re.findall(r'Parser key "([^"]+)":\s+(Expected [^\n]+)', message)
    if place is None or not (unknown or wrong):
        return " ".join(message.split())
    if unknown:
        kind, name = unknown[-1]
        return f"{place['key']} is {kind.rpartition('.')[2]}, which has no setting {name!r}; correct its name"
    key, reason = wrong[-1]
    setting = key if key == place["key"] else f"{place['key']}.{key}"
    return f"{setting}: {reason}; correct its value"


def _saved_settings(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"ckpt_path {str(path)!r} cannot be read ({reason}); give another checkpoint") from error
    saved = dict(checkpoint.get("hyper_parameters", {}))
    saved.pop("_instantiator", None)
    if "_class_path" in saved:
        saved["class_path"] = saved.pop("_class_path")
    return flatten(saved) if saved else {}


def _last_checkpoint(trainer: Trainer) -> str:
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    found = [path for callback in callbacks for path in callback._find_last_checkpoints(trainer)]
    if not found:
        places = ", ".join(str(callback.dirpath) for callback in callbacks if callback.dirpath) or "the run's new log directory"
        raise ConfigurationError(
            f"ckpt_path is 'last', but there is no last checkpoint in {places}; leave ckpt_path out to start afresh, "
            "or give the checkpoint's file"
        )
    return max(found, key=lambda path: Path(path).stat().st_mtime)


def warn_of_busy_threads(trainer: Trainer) -> None:
    """Say so if processes on a CPU are given more threads than there are cores: these wait for each other by spinning.

    Left to itself, Lightning divides the cores among the processes.
    """
    asked, cores = os.environ.get("OMP_NUM_THREADS", ""), os.cpu_count() or 1
    if not isinstance(trainer.accelerator, CPUAccelerator) or trainer.num_devices == 1 or not asked.isdecimal():
        return
    if int(asked) * trainer.num_devices > cores:
        rank_zero_warn(
            f"OMP_NUM_THREADS is {asked}: {trainer.num_devices} processes of {asked} threads share {cores} cores, which takes "
            "several times as long; unset it"
        )


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        args: Arguments without the program's name; None takes those of the process.

    Raises:
        SystemExit: With code 2 after a setting that cannot work, 1 after a loss that is not finite, 143 after SIGTERM; the
            reason is one sentence on stderr.
    """
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata calls it at every loader
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")  # Lightning, every fit
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # teachers and encoders are meant to be
    warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")  # diffusers 0.41 knows no other name
    # Checkpoints of manually optimized methods hold the state after the step, like those of all others.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    argv = sys.argv[1:] if args is None else list(args)
    try:
        if argv[:1] == ["sample"]:
            # Imported by name and late: sampling needs none of the training code.
            import_module("lightning_distill.sampling").main(argv[1:])
        elif argv[:1] == ["precompute"]:
            PrecomputeCLI(argv[1:])
        elif argv[:1] == ["export"]:
            ExportCLI(argv[1:])
        elif argv[:1] == ["plan"]:
            PlanCLI(argv[1:])
        else:
            DistillCLI(args)
    except ValueError as error:
        if (found := _configuration_error(error)) is None:
            raise
        _end(found, 2)
    except NonFiniteError as error:
        _end(error, 1)
    except SIGTERMException as terminated:
        # Lightning's own has no code, and would end with 0, as if the run were complete.
        sys.exit(EXIT_CODE if terminated.code is None else terminated.code)


def _configuration_error(error: BaseException | None) -> ConfigurationError | None:
    """The error that others were raised from: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, ConfigurationError):
        error = error.__cause__ or error.__context__
    return error


def _end(error: Exception, code: int) -> NoReturn:
    sys.stderr.write(f"error: {error}\n")
    sys.exit(code)
