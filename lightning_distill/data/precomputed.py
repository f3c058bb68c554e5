"""LightningDataModule of precomputed latents and conditions, the output of `precompute`."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_distill.data.encoded_index import SPLITS, EncodedIndex, EncodedShard
from lightning_distill.data.encoded_shards import NULL, EncodedSample, ShardReader
from lightning_distill.data.resumable import ResumableData
from lightning_distill.errors import ConfigurationError
from lightning_distill.paths import expand_path
from lightning_distill.teachers.model_adapter import Condition


class PrecomputedDataset(Dataset[dict[str, Any]]):
    """Encoded samples of a split, loaded one batch at a time.

    Args:
        directory: Directory of the shards.
        shards: Index entries of the split's shards.
    """

    def __init__(self, directory: Path, shards: Sequence[EncodedShard]) -> None:
        self.shards = list(shards)
        self.reader = ShardReader(directory)
        self.sample_indices = [index for shard in self.shards for index in shard.sample_indices]
        self._ends = list(accumulate(shard.samples for shard in self.shards))

    def __len__(self) -> int:
        return len(self.sample_indices)

    def sample(self, index: int) -> EncodedSample:
        """Read one sample."""
        number = bisect_right(self._ends, index)
        first = self._ends[number - 1] if number else 0
        return self.reader.read(self.shards[number].file, index - first)

    def prompts(self) -> Iterator[str]:
        """All prompts, in order."""
        for shard in self.shards:
            yield from self.reader.prompts(shard.file)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Load a batch of one sample."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """Load a batch. `DataLoader` calls this once per batch, instead of `__getitem__` once per sample.

        Returns:
            `prompt`, list of B captions; `condition`, named tensors (B, ...) with the condition inputs of the networks;
            `latents` (B, C, h, w), float32, if the data has images; and `index` (B,), int64, indices in the source data set.
        """
        samples = [self.sample(index) for index in indices]
        batch: dict[str, Any] = {
            "prompt": [sample.prompt for sample in samples],
            "index": torch.tensor([self.sample_indices[index] for index in indices], dtype=torch.int64),
            "condition": stack_conditions(samples),
        }
        latents = [sample.latents for sample in samples if sample.latents is not None]
        return {**batch, "latents": torch.stack(latents)} if latents else batch


class Precomputed(ResumableData):
    """Precomputed latents and conditions of another DataModule's images and prompts, for training without encoders.

    Batches contain `latents` and `condition` in place of `image`. With the same `seed` and `batch_size`, each batch has the
    same samples as in the source DataModule, buckets included. Training is therefore equal. All epochs skip broken images.
    A run resumed mid-epoch sees the same samples as an uninterrupted run.

    Validation, test and prediction use the validation samples. Images can be generated only for the validation prompts.

    Args:
        directory: Directory that was passed to `precompute --out`.
        batch_size: Samples per batch and process.
        seed: Seed of the training order.
        num_workers: Worker processes per `DataLoader`, which read the files; 0 reads them in the main process, between training
            steps.
        verify: Whether to compare the contents of all files with the digests in the index at the start, which reads all files
            once, about a gigabyte per second and core. None does so up to 8 GiB. Sizes of files are always compared, and each
            sample is compared with its checksum whenever it is read.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    def __init__(
        self, directory: str, batch_size: int = 1, seed: int = 0, num_workers: int = 4, verify: bool | None = None
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        self.directory = Path(expand_path(directory, "data.directory"))
        self.verify = verify
        self.save_hyperparameters(logger=False)  # the logger's table has the model's settings, and names may clash
        self._index: EncodedIndex | None = None
        self._buckets: list[int] | None = None
        self._train: PrecomputedDataset | None = None
        self._validation: PrecomputedDataset | None = None
        self._null: Condition | None = None
        self._rows: dict[str, int] = {}

    def prepare_data(self) -> None:
        """Compare the files with the index, in one process per machine.

        Raises:
            ConfigurationError: If a file is missing or damaged.
        """
        self._read_index().check_files(self.directory, contents=self.verify)

    def setup(self, stage: str | None = None) -> None:
        """Read the index. Samples are read when a batch is loaded.

        Raises:
            ConfigurationError: If the precomputed data is missing, incomplete or damaged, or there are too few samples for one
                training batch per process.
        """
        if self._index is None:
            index = self._read_index()
            index.check_files(self.directory, contents=False)
            train, validation = (PrecomputedDataset(self.directory, index.shards[split]) for split in SPLITS)
            buckets = [shard.buckets for shard in train.shards if shard.buckets is not None]
            self._buckets = [bucket for shard_buckets in buckets for bucket in shard_buckets] if buckets else None
            self.has_images = index.has_images
            self._null = train.reader.read(NULL, 0).condition
            for row, prompt in enumerate(validation.prompts()):
                self._rows.setdefault(prompt, row)
            self._index, self._train, self._validation = index, train, validation
        if stage in ("fit", None):
            self.training_sampler(self.require_setup(self._train))  # raises if there is no full batch

    def _read_index(self) -> EncodedIndex:
        index = EncodedIndex.read(self.directory, "data.directory")
        if not index.complete:
            raise ConfigurationError(
                f"data.directory is {str(self.directory)!r}, where `precompute` has not finished; run the same command again "
                "to resume it"
            )
        return index

    @property
    def training_buckets(self) -> list[int] | None:
        """Bucket of each training sample, or None if the source DataModule had no buckets."""
        return self._buckets

    def check_encodings(self, settings: Mapping[str, Any]) -> None:
        """Check that the training adapter has the encoders of the precomputed data.

        Args:
            settings: `encoding_settings` of the training adapter.

        Raises:
            ConfigurationError: If a setting differs from the settings of the precomputed data.
        """
        data_settings = (self._index or self._read_index()).settings
        for name, value in settings.items():
            data_value = data_settings.get(f"adapter.{name}")
            if data_value != value:
                raise ConfigurationError(
                    f"data.directory {str(self.directory)!r} was precomputed with another teacher (adapter.{name} was "
                    f"{data_value!r}, and is now {value!r}); precompute again with this teacher, or train with the other one"
                )

    def encoded_prompts(self, prompts: Sequence[str]) -> Condition:
        """Conditions (B, ...) of B prompts, on the CPU.

        Args:
            prompts: Validation prompts, or the empty prompt.

        Raises:
            ConfigurationError: If a prompt is neither empty nor a validation prompt.
        """
        self.check_known_prompts(prompts)
        validation, null = self.require_setup(self._validation), self._null
        assert null is not None
        rows: dict[str, Condition] = {"": null}
        rows |= {prompt: validation.sample(self._rows[prompt]).condition for prompt in dict.fromkeys(prompts) if prompt}
        return {name: torch.stack([rows[prompt][name] for prompt in prompts]) for name in null}

    def check_known_prompts(self, prompts: Sequence[str]) -> None:
        """Raise `ConfigurationError` if a prompt is neither empty nor a validation prompt."""
        unknown = [prompt for prompt in prompts if prompt and prompt not in self._rows]
        if unknown:
            raise ConfigurationError(
                f"the prompt {unknown[0]!r} is not among the validation prompts in {str(self.directory)!r}, and training on "
                "precomputed data loads no text encoder; choose a validation prompt, or add this one to the validation data "
                "and precompute again"
            )


def stack_conditions(samples: Sequence[EncodedSample]) -> Condition:
    """Stack the conditions of B samples into named tensors (B, ...)."""
    return {name: torch.stack([sample.condition[name] for sample in samples]) for name in samples[0].condition}
