"""The command line: `python -m lightning_distill fit` by a thin LightningCLI, and commands beside it."""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from typing import Any, NoReturn

from lightning.fabric import Fabric
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lightning_distill.callbacks.termination import EXIT_CODE
from lightning_distill.commands.parser import configuration_error
from lightning_distill.commands.precompute import PrecomputeOptions, precompute
from lightning_distill.commands.training import DistillCLI, trainer_error
from lightning_distill.errors import NonFiniteError
from lightning_distill.export.checkpoint import CheckpointExport, export_checkpoint
from lightning_distill.planning import PlanOptions, plan


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
            raise trainer_error(error, settings) from error

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
            import_module("lightning_distill.commands.sample").main(argv[1:])
        elif argv[:1] == ["precompute"]:
            PrecomputeCLI(argv[1:])
        elif argv[:1] == ["export"]:
            ExportCLI(argv[1:])
        elif argv[:1] == ["plan"]:
            PlanCLI(argv[1:])
        else:
            DistillCLI(args)
    except ValueError as error:
        if (found := configuration_error(error)) is None:
            raise
        _end(found, 2)
    except NonFiniteError as error:
        _end(error, 1)
    except SIGTERMException as terminated:
        # Lightning's own has no code, and would end with 0, as if the run were complete.
        sys.exit(EXIT_CODE if terminated.code is None else terminated.code)


def _end(error: Exception, code: int) -> NoReturn:
    sys.stderr.write(f"error: {error}\n")
    sys.exit(code)
