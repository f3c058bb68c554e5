"""Data loading that resumes mid-epoch with the exact next sample."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_distill.data.buckets import BucketSampler
from lightning_distill.data.epoch_sampler import EpochSampler
from lightning_distill.data.resumable_loader import ResumableLoader, continue_epoch
from lightning_distill.errors import ConfigurationError

BatchDataset = Dataset[dict[str, Any]]
"""Dataset whose `__getitems__` loads a full batch for a list of indices."""
DatasetT = TypeVar("DatasetT", bound=BatchDataset)


class ResumableData(LightningDataModule):
    """Base class of the DataModules: the batch order depends only on (seed, epoch), and training resumes mid-epoch.

    Args:
        batch_size: Samples per batch and process.
        seed: Seed of the training order.
        num_workers: Worker processes per `DataLoader`.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    has_images: bool = True
    """Whether batches have images or latents, besides prompts."""

    def __init__(self, batch_size: int, seed: int, num_workers: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigurationError(f"data.batch_size is {batch_size}; set it to 1 or more")
        if num_workers < 0:
            raise ConfigurationError(f"data.num_workers is {num_workers}; set it to 0 or more")
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self._train: BatchDataset | None = None
        self._validation: BatchDataset | None = None

    @property
    def image_sizes(self) -> Mapping[str, Sequence[tuple[int, int]]]:
        """Sizes (height, width) in pixels that settings give the images, by the names of these settings."""
        return {}

    @property
    def training_buckets(self) -> Sequence[int] | None:
        """Bucket of each training sample; all samples of a batch share a bucket. None if there are no buckets."""
        return None

    def splits(self) -> dict[str, BatchDataset]:
        """Datasets that `setup` created, under the names "train" and "validation"."""
        return {"train": self.require_setup(self._train), "validation": self.require_setup(self._validation)}

    def count_broken(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Count the samples that a dataset skipped in a batch; their descriptions are in `batch["broken"]`.

        Returns:
            The batch without `broken`.
        """
        return batch

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches; the incomplete last batch is dropped."""
        return self.training_loader(self.require_setup(self._train))

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches in a fixed order."""
        return self.evaluation_loader(self.require_setup(self._validation))

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Validation batches."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Validation batches."""
        return self.val_dataloader()

    def require_setup(self, dataset: DatasetT | None) -> DatasetT:
        """Return the dataset that `setup` created.

        Raises:
            RuntimeError: If `setup` was not called, so that the dataset is None.
        """
        if dataset is None:
            raise RuntimeError(f"{type(self).__name__} is not set up yet; call setup(stage) first")
        return dataset

    def check_training_size(self, samples: int) -> None:
        """Raise `ConfigurationError` if there are too few samples for one training batch per process."""
        replicas, _ = self._replicas()
        if samples < replicas * self.batch_size:
            raise ConfigurationError(
                f"{samples} training samples are too few for a batch of data.batch_size {self.batch_size} on each of "
                f"{replicas} processes; lower data.batch_size, or give more samples"
            )

    def training_loader(self, dataset: BatchDataset) -> ResumableLoader:
        """Shuffled batches; the incomplete last batch is dropped.

        Raises:
            ConfigurationError: If there are too few samples for one batch per process.
        """
        return self.resumable_loader(dataset, self.training_sampler(dataset))

    def training_sampler(self, dataset: BatchDataset) -> EpochSampler:
        """Sampler of the training order; with buckets, all samples of a batch share one bucket.

        Raises:
            ConfigurationError: If there are too few samples for one batch per process.
        """
        self.check_training_size(len(dataset))  # type: ignore[arg-type]
        settings = self.batch_size, self.seed, *self._replicas()
        if self.training_buckets is None:
            return EpochSampler(dataset, *settings)
        sampler = BucketSampler(dataset, self.training_buckets, *settings)
        if len(sampler) == 0:
            raise ConfigurationError(
                f"the buckets have fewer full batches of data.batch_size {self.batch_size} than there are processes; lower "
                "data.batch_size, use fewer buckets, or give more samples"
            )
        return sampler

    def resumable_loader(self, dataset: BatchDataset, sampler: EpochSampler) -> ResumableLoader:
        """Batches in the order of a sampler."""

        def on_restored(loader: ResumableLoader, state: dict[str, Any]) -> None:
            if self.trainer:
                continue_epoch(self.trainer, loader, state)

        return ResumableLoader(dataset, sampler, on_restored, **self._loader_settings())

    def evaluation_loader(self, dataset: BatchDataset) -> DataLoader[dict[str, Any]]:
        """All batches in a fixed order."""
        return DataLoader(dataset, batch_size=self.batch_size, **self._loader_settings())

    def _replicas(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader_settings(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "collate_fn": _identity_collate,
            # A `DataLoader` samples a worker seed at every start. The global generator would shift the random numbers of
            # training, because a resumed run starts its loaders at other steps.
            "generator": torch.Generator().manual_seed(self.seed),
        }


def _identity_collate(batch: dict[str, Any]) -> dict[str, Any]:
    """Collate function that returns the batch unchanged, because `__getitems__` has already collated it."""
    return batch
