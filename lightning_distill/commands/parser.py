"""Argument parser with named configs and one-line error messages."""

import re
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentError
from lightning.pytorch.cli import LightningArgumentParser
from omegaconf.errors import OmegaConfBaseException

from lightning_distill.commands.config_files import BASE, config_chain, without_keys
from lightning_distill.commands.config_sources import merged_sources
from lightning_distill.commands.diagnosis import OPTIONS, OTHER_KEYS, Diagnosis
from lightning_distill.commands.interpolations import interpolation_error
from lightning_distill.commands.setting_names import with_full_names
from lightning_distill.errors import ConfigurationError, find_configuration_error

SUBCOMMAND_ARGUMENTS = ("ckpt_path", "weights_only")
"""Arguments of the training subcommands that `--print_config` prints with the settings; other subcommands lack them."""


class NamedConfig(ActionConfigFile):
    """`--config NAME`: a file or a shipped config, read after the configs under its key `base`."""

    @staticmethod
    def apply_config(parser: Any, cfg: Any, dest: str, value: Any) -> None:
        """Read the files of the config in order; jsonargparse reads a value that is inline YAML."""
        text = str(value)
        inline = "\n" in text or text.lstrip().startswith("{")
        for part in [value] if inline else config_chain(text):
            ActionConfigFile.apply_config(parser, cfg, dest, part if inline else str(part))


class DistillParser(LightningArgumentParser):
    """Parser of configs with a `base`. Its errors are one line, without the usage and the types of all settings.

    Names of options cannot be abbreviated.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        """Parse one config, which `--print_config` may have printed for another subcommand."""
        own = {action.dest for action in self._actions}
        return super().parse_string(without_keys(content, {BASE, *SUBCOMMAND_ARGUMENTS} - own), *args, **kwargs)

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Parse the arguments.

        jsonargparse converts `--model.student.lora=null` to None, and passes the text `None` to the parser of the class. That
        parser needs the YAML text `null`.
        """
        inner = getattr(self, "_inner_parser", False)
        if inner and args is not None:
            args = [f"{arg.removesuffix('=None')}=null" if arg.endswith("=None") else arg for arg in args]
        try:
            return super().parse_args(args, *rest, **kwargs)
        except OmegaConfBaseException as error:
            parser, arguments = self._chosen()
            known = Diagnosis(parser._actions, arguments).types.keys() - OPTIONS - OTHER_KEYS
            raise ConfigurationError(interpolation_error(error, known, merged_sources(arguments))) from error
        except ValueError as error:  # of a value that `_check_value_key` has accepted for its interpolation
            if inner or find_configuration_error(error) is not None:
                raise
            self.error(str(error), error)
        except Exception as error:  # of a module of the user, or a bug, which has a traceback
            if inner or isinstance(error, ArgumentError) or (fault := self.first_fault()) is None:
                raise
            raise ConfigurationError(fault) from error

    def _check_value_key(self, action: Any, value: Any, key: str, cfg: Any, append: bool = False) -> Any:
        """Accept values with an unresolved interpolation such as `${trainer.max_steps}`.

        When a later file changes a class, jsonargparse silently drops earlier values that do not fit the new class. It checks
        them before it resolves interpolations.
        """
        try:
            return super()._check_value_key(action, value, key, cfg, append)
        except (TypeError, ValueError):
            if "${" in str(value):
                return value
            raise

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit with code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        configuration_error = find_configuration_error(ex)
        if configuration_error:
            reason = with_full_names(str(configuration_error), merged_sources(self._chosen()[1]))
        else:
            reason = self.first_fault() or _one_line(message)
        self.exit(2, f"error: {reason}\n")
        raise AssertionError("unreachable")

    def first_fault(self) -> str | None:
        """The first fault of the arguments in one line, if the types of the settings show one."""
        parser, arguments = self._chosen()
        return Diagnosis(parser._actions, arguments).first_fault()

    def _chosen(self) -> tuple[Any, list[str]]:
        """The parser of the chosen subcommand and its arguments; in a parser without subcommands, itself and all arguments."""
        arguments = list(self.args)
        if (subcommands := self._subcommands_action) is not None:
            for i, argument in enumerate(arguments):
                if argument in subcommands.choices:
                    return subcommands.choices[argument], arguments[i + 1 :]
        return self, arguments


def _one_line(message: str) -> str:
    """One-line form of a jsonargparse message, without the types that it lists."""
    if (missing := re.search(r"the following arguments are required: (.*)", message)) is not None:
        names = [name.split(".", 1)[-1] for name in missing[1].split(", ")]
        verb = "are" if len(names) > 1 else "is"
        return f"{' and '.join(names)} {verb} not set; give --config with a file or the name of a shipped config"
    place = re.match(r'Parser key "(?P<key>[^"]+)":', message)
    lines = [line.strip(" -") for line in message.splitlines()]
    reasons = [
        line for line in lines if line and not re.match(r"Parser key|Subtypes:|Errors:|Given value|Does not validate", line)
    ]
    if place is None or not reasons:
        return " ".join(message.split())
    return f"{place['key']}: {reasons[-1]}; correct its value"
