"""Loaders that go on, after an interruption, with the very sample that came next."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_distill.data.buckets import BucketSampler
from lightning_distill.data.epoch_sampler import EpochSampler
from lightning_distill.errors import ConfigurationError

Batches = Dataset[dict[str, Any]]
"""A data set that makes a whole batch of a list of indices, in `__getitems__`."""
DatasetT = TypeVar("DatasetT", bound=Batches)


class ResumableData(LightningDataModule):
    """What DataModules share: batches whose order is a function of (seed, epoch) and survives a resume mid-epoch.

    Args:
        batch_size: Samples a batch and process.
        seed: Seed of the order of training.
        num_workers: Worker processes a loader.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    has_images: bool = True
    """Whether batches have pictures, or their latents, beside their prompts."""

    def __init__(self, batch_size: int, seed: int, num_workers: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigurationError(f"data.batch_size is {batch_size}; set it to 1 or more")
        if num_workers < 0:
            raise ConfigurationError(f"data.num_workers is {num_workers}; set it to 0 or more")
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self._train: Batches | None = None
        self._validation: Batches | None = None

    @property
    def training_buckets(self) -> Sequence[int] | None:
        """Bucket of each training sample, where batches are of one bucket; None where all samples go together."""
        return None

    def splits(self) -> dict[str, Batches]:
        """What `setup` has made to train on and to validate on, under the names "train" and "validation"."""
        return {"train": self.ready(self._train), "validation": self.ready(self._validation)}

    def count_broken(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Take note of the samples that a data set has left out of a batch, under `broken`.

        Returns:
            The batch without that.
        """
        return batch

    def train_dataloader(self) -> StatefulDataLoader:
        """Shuffled batches; the incomplete last one is left out."""
        return self.training_loader(self.ready(self._train))

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches in a fixed order."""
        return self.evaluation_loader(self.ready(self._validation))

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The same as for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The same as for validation."""
        return self.val_dataloader()

    def ready(self, dataset: DatasetT | None) -> DatasetT:
        """The data set, which `setup` makes.

        Raises:
            RuntimeError: If it has not.
        """
        if dataset is None:
            raise RuntimeError(f"{type(self).__name__} is not set up yet; call setup(stage) first")
        return dataset

    def refuse_too_few(self, samples: int) -> None:
        """Raise `ConfigurationError` where a process would not get a single training batch."""
        replicas, _ = self._replicas()
        if samples < replicas * self.batch_size:
            raise ConfigurationError(
                f"{samples} training samples do not hold a batch of data.batch_size {self.batch_size} for each of {replicas} "
                "processes; lower batch_size or give more samples"
            )

    def training_loader(self, dataset: Batches) -> StatefulDataLoader:
        """Shuffled batches; the incomplete last one is left out.

        Raises:
            ConfigurationError: If a process would not get a single batch.
        """
        return self.resumable_loader(dataset, self.training_sampler(dataset))

    def training_sampler(self, dataset: Batches) -> EpochSampler:
        """The order of training, in batches of one bucket if there are buckets.

        Raises:
            ConfigurationError: If a process would not get a single batch.
        """
        self.refuse_too_few(len(dataset))  # type: ignore[arg-type]
        settings = self.batch_size, self.seed, *self._replicas()
        if self.training_buckets is None:
            return EpochSampler(dataset, *settings)
        sampler = BucketSampler(dataset, self.training_buckets, *settings)
        if len(sampler) == 0:
            raise ConfigurationError(
                f"no bucket holds a batch of data.batch_size {self.batch_size} for each process; lower batch_size, have fewer "
                "buckets, or give more samples"
            )
        return sampler

    def resumable_loader(self, dataset: Batches, sampler: EpochSampler) -> StatefulDataLoader:
        """Batches in a sampler's order."""
        if self.trainer:  # Lightning sets the epoch too, but only after worker processes have begun to fetch
            progress: Any = self.trainer.fit_loop.epoch_progress.current
            sampler.set_epoch(progress.processed)
        return StatefulDataLoader(dataset, sampler=sampler, drop_last=True, **self._loader_settings())

    def evaluation_loader(self, dataset: Batches) -> DataLoader[dict[str, Any]]:
        """All batches in a fixed order."""
        return DataLoader(dataset, **self._loader_settings())

    def _replicas(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader_settings(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "collate_fn": _whole_batch,
            # A loader draws a seed for its workers at every start. From the global generator that would shift what
            # training draws afterwards, and a resumed run starts its loaders at other times.
            "generator": torch.Generator().manual_seed(self.seed),
        }


def _whole_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Stands in for the loader's collate function: `__getitems__` has already made the batch."""
    return batch
