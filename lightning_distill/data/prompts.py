"""Prompts without pictures, for distillation that needs no data, as a LightningDataModule."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_distill.data.resumable import ResumableData
from lightning_distill.errors import ConfigurationError


class PromptDataset(Dataset[dict[str, Any]]):
    """Prompts, fetched a batch at a time.

    Args:
        prompts: All of them.
    """

    def __init__(self, prompts: Sequence[str]) -> None:
        self.prompts = list(prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A batch of one prompt."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """A whole batch: `prompt`, list of B prompts, and `index` (B,), int64."""
        return {"prompt": [self.prompts[i] for i in indices], "index": torch.tensor(indices, dtype=torch.int64)}


class Prompts(ResumableData):
    """Prompts from a file, without pictures: states to train on come from trajectories of the student or its teacher.

    The file is a text with one prompt a line, or, ending in `.jsonl`, one object a line with the prompt under "text". Empty
    lines are skipped, and a prompt that occurs twice counts once. The order of an epoch is a function of (`seed`, epoch)
    alone, so a run resumed in the middle of an epoch sees what the uninterrupted run would have seen.

    Validation, test and prediction use the prompts of `validation_file`, or `validation_samples` of `file` that training then
    leaves out, chosen by their text: they do not depend on `seed` or on the order of the lines.

    Args:
        file: Prompts to train on.
        validation_file: Prompts to validate on; None takes `validation_samples` of `file`.
        validation_samples: Number of prompts of `file` to validate on; not used where there is a `validation_file`.
        batch_size: Prompts a batch and process.
        seed: Seed of the order of training.
        num_workers: Worker processes a loader; prompts are in memory, so none are needed.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    has_images = False

    def __init__(
        self,
        file: str,
        validation_file: str | None = None,
        validation_samples: int = 64,
        batch_size: int = 1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        if validation_samples < 1:
            raise ConfigurationError(f"data.validation_samples is {validation_samples}; set it to 1 or more")
        self.file = Path(file)
        self.validation_file = None if validation_file is None else Path(validation_file)
        self.validation_samples = validation_samples
        self.save_hyperparameters(logger=False)  # the logger's table has the model's settings, which may share a name
        self._train: PromptDataset | None = None
        self._validation: PromptDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the prompts.

        Raises:
            ConfigurationError: If a file is missing, a line of it cannot be read, or training has less than a batch.
        """
        if self._validation is None:
            if self.validation_file is None:
                train, validation = split(read_prompts(self.file, "data.file"), self.validation_samples)
                self._train, self._validation = PromptDataset(train), PromptDataset(validation)
            else:
                self._validation = PromptDataset(read_prompts(self.validation_file, "data.validation_file"))
        if stage in ("fit", None):
            if self._train is None:
                self._train = PromptDataset(read_prompts(self.file, "data.file"))
            self.refuse_too_few(len(self._train))


def read_prompts(path: Path, setting: str) -> list[str]:
    """The prompts of a file, each once, in their order.

    Args:
        path: A text, or lines of JSON.
        setting: Name of the setting that gives the file, for errors.

    Raises:
        ConfigurationError: If there is no such file, a line of it cannot be read, or it has no prompts.
    """
    if not path.is_file():
        raise ConfigurationError(f"{setting} is {str(path)!r}, which is not a file; give one with a prompt a line")
    with path.open("rb") as file:
        lines = [(number, text) for number, text in enumerate(file, start=1) if text.strip()]
    prompts = dict.fromkeys(_parsed(text, path, number) for number, text in lines)
    if not prompts:
        raise ConfigurationError(f"{path} of {setting} is empty; write a prompt a line")
    return list(prompts)


def _parsed(text: bytes, path: Path, line: int) -> str:
    try:
        if path.suffix != ".jsonl":
            return text.decode().strip()
        entry = json.loads(text)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ConfigurationError(f"line {line} of {path} cannot be read ({error}); correct or remove it") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise ConfigurationError(f'line {line} of {path} has no string under "text"; correct or remove it')
    return str(entry["text"])


def split(prompts: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """Prompts to train on and prompts to validate on, each in their order; those with the smallest hashes validate."""
    chosen = set(sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())[:count])
    return [prompt for prompt in prompts if prompt not in chosen], [prompt for prompt in prompts if prompt in chosen]
