"""LightningDataModule of prompts without images, for data-free distillation."""

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
    """Prompts, loaded one batch at a time.

    Args:
        prompts: Prompts of the split.
    """

    def __init__(self, prompts: Sequence[str]) -> None:
        self.prompts = list(prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Load a batch of one prompt."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """Load a batch: `prompt`, list of B prompts, and `index` (B,), int64."""
        return {"prompt": [self.prompts[i] for i in indices], "index": torch.tensor(indices, dtype=torch.int64)}


class Prompts(ResumableData):
    """Prompts from a file, without images. Training states come from trajectories of the student or of its teacher.

    A text file has one prompt per line. A `.jsonl` file has one JSON object per line, with the prompt under "text". Empty lines
    and duplicate prompts are skipped. The sample order of an epoch depends only on (`seed`, epoch). A run resumed mid-epoch
    therefore sees the same samples as an uninterrupted run.

    Validation, test and prediction use the prompts of `validation_file`. Without one, they use `validation_samples` prompts of
    `file`, and training excludes these prompts. Hashes of the prompts select them, so the split does not depend on `seed` or on
    the line order.

    Args:
        file: File of the training prompts.
        validation_file: File of the validation prompts; None uses `validation_samples` prompts of `file`.
        validation_samples: Number of validation prompts from `file`; ignored if `validation_file` is set.
        batch_size: Prompts per batch and process.
        seed: Seed of the training order.
        num_workers: Worker processes per `DataLoader`; prompts are in memory, so none are needed.

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
        self.save_hyperparameters(logger=False)  # the logger's table has the model's settings, and names may clash
        self._train: PromptDataset | None = None
        self._validation: PromptDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the prompts.

        Raises:
            ConfigurationError: If a file is missing or empty, a line cannot be parsed, or there are too few prompts for one
                training batch per process beside `validation_samples`.
        """
        if self._validation is None:
            if self.validation_file is None:
                prompts = read_prompts(self.file, "data.file")
                train, validation = split(prompts, self.validation_samples)
                if not train:
                    raise ConfigurationError(
                        f"data.validation_samples is {self.validation_samples}, which leaves none of the {len(prompts)} "
                        f"prompts of {self.file} for training; lower it, or set data.validation_file"
                    )
                self._train, self._validation = PromptDataset(train), PromptDataset(validation)
            else:
                self._validation = PromptDataset(read_prompts(self.validation_file, "data.validation_file"))
        if stage in ("fit", None):
            if self._train is None:
                self._train = PromptDataset(read_prompts(self.file, "data.file"))
            self.check_training_size(len(self._train))


def read_prompts(path: Path, setting: str) -> list[str]:
    """Unique prompts of a file, in file order.

    Args:
        path: Text file, or `.jsonl` file.
        setting: Name of the setting with the file, for error messages.

    Raises:
        ConfigurationError: If the file is missing, a line cannot be parsed, or there are no prompts.
    """
    if not path.is_file():
        raise ConfigurationError(f"{setting} is {str(path)!r}, which is not a file; give a file with one prompt per line")
    with path.open("rb") as file:
        lines = [(number, text) for number, text in enumerate(file, start=1) if text.strip()]
    prompts = dict.fromkeys(_parse_line(text, path, number) for number, text in lines)
    if not prompts:
        raise ConfigurationError(f"{path} of {setting} is empty; write one prompt per line")
    return list(prompts)


def _parse_line(text: bytes, path: Path, line: int) -> str:
    try:
        if path.suffix != ".jsonl":
            return text.decode().strip()
        entry = json.loads(text)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ConfigurationError(f"line {line} of {path} cannot be parsed ({error}); correct or remove it") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise ConfigurationError(f'line {line} of {path} has no string under "text"; correct or remove it')
    return str(entry["text"])


def split(prompts: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """Split prompts into training and validation prompts, both in file order. The smallest hashes are for validation."""
    validation = set(sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())[:count])
    return [prompt for prompt in prompts if prompt not in validation], [prompt for prompt in prompts if prompt in validation]
