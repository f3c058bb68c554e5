"""The parser of configs, and its errors in one sentence."""

import re
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser

from lightning_distill.commands.config_files import BASE, config_chain, without_keys
from lightning_distill.errors import ConfigurationError

OF_A_RUN = ("ckpt_path", "weights_only")
"""What `--print_config` prints besides settings: arguments of the command that it was given to."""


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
        """Parse the settings of one file, which may be printed for another command than this parser's."""
        own = {action.dest for action in self._actions}
        return super().parse_string(without_keys(content, {BASE, *OF_A_RUN} - own), *args, **kwargs)

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
        self.exit(2, f"error: {configuration_error(ex) or _one_sentence(message)}\n")
        raise AssertionError("unreachable")


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


def configuration_error(error: BaseException | None) -> ConfigurationError | None:
    """The error that others were raised from: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, ConfigurationError):
        error = error.__cause__ or error.__context__
    return error
