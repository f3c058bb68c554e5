"""The place of a pipeline and the setting that names it, for error messages of one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lightning_distill.errors import ConfigurationError

LONGEST_REASON = 300
"""Largest number of characters of another library's message in an error message."""


@dataclass(frozen=True)
class PipelineSource:
    """A directory or hub id of a pipeline.

    Attributes:
        setting: Dotted name of the setting, such as "adapter.pretrained".
        value: Value of the setting.
    """

    setting: str
    value: str

    def error(self, clause: str) -> ConfigurationError:
        """Error whose message continues "adapter.pretrained is 'model', " with a clause."""
        return ConfigurationError(f"{self.setting} is {self.value!r}, {clause}")

    @contextmanager
    def loading(self, component: str) -> Iterator[None]:
        """Context that loads a component and converts all errors, of whatever library, to one line; not of lacking memory.

        Raises:
            ConfigurationError: If the component cannot be loaded.
        """
        try:
            yield
        except (ConfigurationError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
            raise self.error(f"whose {component} cannot be loaded ({reason}); download or export it again") from error
