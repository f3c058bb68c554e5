"""Latents and conditions that `precompute` has written, as a LightningDataModule."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_distill.data.encoded_shards import NULL, SPLITS, EncodedIndex, EncodedSample, EncodedShard, ShardReader
from lightning_distill.data.resumable import ResumableData
from lightning_distill.errors import ConfigurationError
from lightning_distill.teachers.model_adapter import Condition


class PrecomputedDataset(Dataset[dict[str, Any]]):
    """Encoded samples of a split, fetched a batch at a time.

    Args:
        directory: Where the shards are.
        shards: Of the split.
    """

    def __init__(self, directory: Path, shards: Sequence[EncodedShard]) -> None:
        self.shards = list(shards)
        self.reader = ShardReader(directory)
        self.places = [place for shard in self.shards for place in shard.places]
        self._ends = list(accumulate(len(shard.places) for shard in self.shards))

    def __len__(self) -> int:
        return len(self.places)

    def sample(self, index: int) -> EncodedSample:
        """One sample."""
        number = bisect_right(self._ends, index)
        first = self._ends[number - 1] if number else 0
        return self.reader.read(self.shards[number].file, index - first)

    def prompts(self) -> Iterator[str]:
        """All prompts, in order."""
        for shard in self.shards:
            yield from self.reader.prompts(shard.file)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A batch of one sample."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """A whole batch: the loader calls this once a batch in place of `__getitem__` once a sample.

        Returns:
            `prompt`, list of B captions; `condition`, the named tensors (B, ...) that the networks are told of them;
            `latents` (B, C, h, w), float32, if there are pictures; and `index` (B,), int64, places in the original data set.
        """
        samples = [self.sample(index) for index in indices]
        batch: dict[str, Any] = {
            "prompt": [sample.prompt for sample in samples],
            "index": torch.tensor([self.places[index] for index in indices], dtype=torch.int64),
            "condition": stacked(samples),
        }
        latents = [sample.latents for sample in samples if sample.latents is not None]
        return {**batch, "latents": torch.stack(latents)} if latents else batch


class Precomputed(ResumableData):
    """What `precompute` has made of another DataModule's pictures and prompts, so that training needs no encoders.

    Batches hold `latents` and `condition` in the place of `image`. Batch for batch they are those of the DataModule that this
    was made from, under the same `seed` and `batch_size`, buckets included, so that training is equal; broken pictures sit out
    all epochs here. A run resumed in the middle of an epoch sees what the uninterrupted run would have seen.

    Validation, test and prediction use the validation samples, and pictures can be drawn of their prompts and of no others.

    Args:
        directory: What `precompute --out` has written.
        batch_size: Samples a batch and process.
        seed: Seed of the order of training.
        num_workers: Worker processes a loader, which read the files; 0 reads them between steps.
        verify: Whether to compare the contents of all files with the digests in the index, which reads all of them once. Their
            sizes are compared in any case.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    def __init__(self, directory: str, batch_size: int = 1, seed: int = 0, num_workers: int = 4, verify: bool = False) -> None:
        super().__init__(batch_size, seed, num_workers)
        self.directory = Path(directory)
        self.verify = verify
        self.save_hyperparameters(logger=False)  # the logger's table has the model's settings, which may share a name
        self._index: EncodedIndex | None = None
        self._buckets: list[int] | None = None
        self._train: PrecomputedDataset | None = None
        self._validation: PrecomputedDataset | None = None
        self._null: Condition | None = None
        self._rows: dict[str, int] = {}

    def prepare_data(self) -> None:
        """Compare the files with the index, in one process of a machine.

        Raises:
            ConfigurationError: If one is missing or damaged.
        """
        self._read_index().check_files(self.directory, contents=self.verify)

    def setup(self, stage: str | None = None) -> None:
        """Read the index; samples are read when they are asked for.

        Raises:
            ConfigurationError: If the directory holds no whole precomputed data, or training has less than a batch.
        """
        if self._index is None:
            index = self._read_index()
            index.check_files(self.directory, contents=False)
            train, validation = (PrecomputedDataset(self.directory, index.shards[split]) for split in SPLITS)
            buckets = [shard.buckets for shard in train.shards if shard.buckets is not None]
            self._buckets = [bucket for found in buckets for bucket in found] if buckets else None
            self.has_images = index.has_images
            self._null = train.reader.read(NULL, 0).condition
            for row, prompt in enumerate(validation.prompts()):
                self._rows.setdefault(prompt, row)
            self._index, self._train, self._validation = index, train, validation
        if stage in ("fit", None):
            self.training_sampler(self.ready(self._train))  # refuses what holds no batch

    def _read_index(self) -> EncodedIndex:
        index = EncodedIndex.read(self.directory, "data.directory")
        if not index.complete:
            raise ConfigurationError(
                f"data.directory is {str(self.directory)!r}, which `precompute` has not finished; run the same command again, "
                "which goes on where it was interrupted"
            )
        return index

    @property
    def training_buckets(self) -> list[int] | None:
        """Bucket of each training sample, if the pictures were in buckets."""
        return self._buckets

    def check_encodings(self, settings: Mapping[str, Any]) -> None:
        """Refuse what other encoders have made.

        Args:
            settings: Of the adapter that is to be trained with, as of its `encoding_settings`.

        Raises:
            ConfigurationError: If they differ from those that the data was made with.
        """
        made_with = (self._index or self._read_index()).settings
        for name, value in settings.items():
            made = made_with.get(f"adapter.{name}")
            if made != value:
                raise ConfigurationError(
                    f"data.directory {str(self.directory)!r} was made with another teacher (adapter.{name} {made!r}, and now "
                    f"{value!r}); precompute again with this one, or train with the one that it was made with"
                )

    def encoded_prompts(self, prompts: Sequence[str]) -> Condition:
        """Conditions (B, ...) of B prompts, on the CPU.

        Args:
            prompts: Of the validation samples, or the empty one.

        Raises:
            ConfigurationError: If there is another.
        """
        self.check_known_prompts(prompts)
        validation, null = self.ready(self._validation), self._null
        assert null is not None
        rows: dict[str, Condition] = {"": null}
        rows |= {prompt: validation.sample(self._rows[prompt]).condition for prompt in dict.fromkeys(prompts) if prompt}
        return {name: torch.stack([rows[prompt][name] for prompt in prompts]) for name in null}

    def check_known_prompts(self, prompts: Sequence[str]) -> None:
        """Raise `ConfigurationError` where pictures are asked for of a prompt that is not among the validation samples'."""
        unknown = [prompt for prompt in prompts if prompt and prompt not in self._rows]
        if unknown:
            raise ConfigurationError(
                f"the prompt {unknown[0]!r} is not among the validation prompts in {str(self.directory)!r}, and there are no "
                "text encoders beside precomputed data; ask for one of those, or precompute with it among the validation data"
            )


def stacked(samples: Sequence[EncodedSample]) -> Condition:
    """The conditions of samples, (B, ...) each."""
    return {name: torch.stack([sample.condition[name] for sample in samples]) for name in samples[0].condition}
