"""LightningDataModule of prompts without images, for data-free distillation."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

from lightning_distill.data.caption_tables import ENDINGS, CaptionColumn, read_lines, read_rows
from lightning_distill.data.resumable import ResumableData
from lightning_distill.errors import ConfigurationError
from lightning_distill.paths import expand_path

TEXT_ENDING = ".txt"
"""Ending of files with one prompt per line."""


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

    A `.txt` file has one prompt per line. A `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file has the prompts in a column;
    the JSON formats may also be lists of strings. Empty lines and duplicate prompts are skipped. The sample order of an epoch
    depends only on (`seed`, epoch). A run resumed mid-epoch therefore sees the same samples as an uninterrupted run.

    Validation, test and prediction use the prompts of `validation_file`. Without one, they use `validation_samples` prompts of
    `file`, and training excludes these prompts. Hashes of the prompts select them, so the split does not depend on `seed` or on
    the line order.

    Args:
        file: File of the training prompts.
        validation_file: File of the validation prompts; None uses `validation_samples` prompts of `file`.
        caption_column: Column of the prompts in a table; None takes "text", "caption" or "prompt".
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
        caption_column: str | None = None,
        validation_samples: int = 64,
        batch_size: int = 1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        if validation_samples < 1:
            raise ConfigurationError(f"data.validation_samples is {validation_samples}; set it to 1 or more")
        self.file = Path(expand_path(file, "data.file"))
        self.validation_file: Path | None = None
        if validation_file is not None:
            self.validation_file = Path(expand_path(validation_file, "data.validation_file"))
        self.caption_column = caption_column
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
                prompts = read_prompts(self.file, "data.file", self.caption_column)
                if stage in ("fit", None) and len(prompts) <= self.validation_samples:
                    raise ConfigurationError(
                        f"data.validation_samples is {self.validation_samples}, but data.file {str(self.file)!r} has only "
                        f"{len(prompts)} prompts, so none are left for training; lower data.validation_samples, or set "
                        "data.validation_file"
                    )
                train, validation = split(prompts, self.validation_samples)
                self._train, self._validation = PromptDataset(train), PromptDataset(validation)
            else:
                self._validation = PromptDataset(
                    read_prompts(self.validation_file, "data.validation_file", self.caption_column)
                )
        if stage in ("fit", None):
            if self._train is None:
                self._train = PromptDataset(read_prompts(self.file, "data.file", self.caption_column))
            self.check_training_size(len(self._train))


def read_prompts(
    path: Path, setting: str, caption_column: str | None = None, column_setting: str = "data.caption_column"
) -> list[str]:
    """Unique prompts of a file, in file order.

    Args:
        path: Text file, or table or list with an ending of `ENDINGS`.
        setting: Name of the setting with the file, for error messages.
        caption_column: Column of the prompts in a table; None searches it.
        column_setting: Name of the setting with the column, for error messages.

    Raises:
        ConfigurationError: If the file is missing, has another ending, cannot be parsed, or has no prompts.
    """
    if not path.is_file():
        raise ConfigurationError(f"{setting} is {str(path)!r}, which is not a file; give a file with one prompt per line")
    ending = path.suffix.lower()
    if ending != TEXT_ENDING and ending not in ENDINGS:
        raise ConfigurationError(
            f"{setting} is {str(path)!r}, which has the ending {path.suffix!r}; convert or rename it to one of "
            f"{', '.join((TEXT_ENDING, *ENDINGS))}"
        )
    if ending == TEXT_ENDING and caption_column is not None:
        raise ConfigurationError(
            f"{column_setting} is {caption_column!r}, but {setting} is {str(path)!r}, which has no columns; remove "
            f"{column_setting}"
        )
    column = CaptionColumn(path, caption_column, column_setting)
    found: list[str] = []
    for row in read_lines(path) if ending == TEXT_ENDING else read_rows(path):
        if ending == TEXT_ENDING:
            found += column.usable([line], row.place) if (line := row.values.strip()) else []  # blank lines separate prompts
        elif isinstance(row.values, str) and caption_column is None:  # a list of strings has no columns
            found += column.usable([row.values], row.place)
        else:
            found += column.read(row)
    column.warn_of_changes()
    prompts = list(dict.fromkeys(found))
    if not prompts:
        raise ConfigurationError(f"{path} of {setting} is empty; write one prompt per line")
    rank_zero_info(f"{len(prompts)} prompts in {path}, {len(found) - len(prompts)} duplicates skipped")
    return prompts


def split(prompts: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """Split prompts into training and validation prompts, both in file order. The smallest hashes are for validation."""
    validation = set(sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())[:count])
    return [prompt for prompt in prompts if prompt not in validation], [prompt for prompt in prompts if prompt in validation]
