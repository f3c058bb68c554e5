"""LightningCLI for any method and data: `fit`, `validate`, `test` and `predict`."""

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_distill.callbacks.optimizer_settings import OptimizerSettings
from lightning_distill.callbacks.predictions import WritePredictions
from lightning_distill.callbacks.random_state import RandomState
from lightning_distill.callbacks.sanity import StopOnNonFinite
from lightning_distill.callbacks.termination import JointTermination
from lightning_distill.commands.config_files import check_learning_rates, flatten
from lightning_distill.commands.parser import DistillParser, NamedConfig
from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.sharding.checkpoint import REST
from lightning_distill.sharding.protocols import Sharding

ALWAYS: tuple[type[Callback], ...] = (RandomState, OptimizerSettings, StopOnNonFinite, JointTermination, WritePredictions)


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
        check_learning_rates(self.config_dump)

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
            raise trainer_error(error, config) from error

    def before_fit(self) -> None:
        """Look for the weights before processes wait for each other, and at how many threads these would have."""
        warn_oversubscription(self.trainer)
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


def trainer_error(error: Exception, config: dict[str, Any]) -> ConfigurationError:
    """What Lightning says of a trainer that cannot be, in one sentence.

    Args:
        error: That its constructor raised.
        config: The settings that it was given.
    """
    reason = " ".join(str(error).split()).rstrip("!.")
    remedy = "correct them"
    if config["accelerator"] not in ("auto", "cpu"):
        remedy = f"trainer.accelerator is {config['accelerator']!r}, and 'auto' or 'cpu' runs without a GPU"
    return ConfigurationError(f"the trainer does not go with this machine or its settings ({reason}); {remedy}")


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


def warn_oversubscription(trainer: Trainer) -> None:
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
