"""Argument parser with named configs and one-line error messages."""

import re
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser

from lightning_distill.commands.config_files import BASE, config_chain, without_keys
from lightning_distill.errors import find_configuration_error

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
    """Parser of configs with a `base`. Its errors omit the usage, which is several pages long."""

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        """Parse one config, which `--print_config` may have printed for another subcommand."""
        own = {action.dest for action in self._actions}
        return super().parse_string(without_keys(content, {BASE, *SUBCOMMAND_ARGUMENTS} - own), *args, **kwargs)

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Parse the arguments.

        jsonargparse converts `--model.student.lora=null` to None, and passes the text `None` to the parser of the class. That
        parser needs the YAML text `null`.
        """
        if getattr(self, "_inner_parser", False) and args is not None:
            args = [f"{arg.removesuffix('=None')}=null" if arg.endswith("=None") else arg for arg in args]
        return super().parse_args(args, *rest, **kwargs)

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
        self.exit(2, f"error: {find_configuration_error(ex) or _one_line(message)}\n")
        raise AssertionError("unreachable")


def _one_line(message: str) -> str:
    """One-line form of a jsonargparse message, which lists all types that a setting of a class accepts."""
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
