"""Base class of the subcommands that read the config of a training run and have options of their own."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

from lightning.pytorch.cli import LightningArgumentParser

from lightning_distill.commands import PROGRAM
from lightning_distill.commands.training import DistillCLI


class OptionsCLI(DistillCLI, ABC):
    """A subcommand on the model, data and trainer settings of `fit`, with the fields of a dataclass as further options.

    Args:
        arguments: Arguments after the name of the subcommand.
        name: Name of the subcommand.

    Attributes:
        trainer: Result of `instantiate_trainer`.
        options_class: Frozen dataclass; its docstring documents the options in `--help`.
        description: First paragraph of `--help`.

    Raises:
        ConfigurationError: If a setting is invalid.
    """

    trainer: Any
    options_class: ClassVar[type[Any]]
    description: ClassVar[str]

    def __init__(self, arguments: Sequence[str], name: str) -> None:
        self.name = name
        super().__init__(arguments, run=False)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Parser with the name and the description of the subcommand."""
        return super().init_parser(prog=f"{PROGRAM} {self.name}", description=self.description, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options."""
        parser.add_class_arguments(self.options_class)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Return the settings of the trainer; a trainer would require the devices in its settings."""
        return self._get(self.config_init, "trainer")

    def after_instantiate_classes(self) -> None:
        """Run the subcommand."""
        self.execute(self.options_class(**{field.name: self.config[field.name] for field in fields(self.options_class)}))

    @abstractmethod
    def execute(self, options: Any) -> None:
        """Run the subcommand.

        Args:
            options: Instance of `options_class`.
        """
