"""Encoding of a data set: latents of its images and conditions of its prompts, in shards."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import Precision
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_distill.commands.encoded_directory import EncodedDirectory, ShardRange
from lightning_distill.data.encoded_shards import EncodedSample
from lightning_distill.data.resumable import BatchDataset, ResumableData
from lightning_distill.errors import ConfigurationError, NonFiniteError
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.methods.encoder import EncodedData
from lightning_distill.methods.setup_checks import check_image_sizes
from lightning_distill.outputs import check_directory
from lightning_distill.paths import expand_path
from lightning_distill.teachers.model_adapter import ModelAdapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class PrecomputeOptions:
    """Options of `precompute`.

    Args:
        out: Output directory; a directory of an interrupted run with the same settings resumes it.
        dtype: Storage dtype of tensors with a higher precision. Training from float32 equals training from images; bfloat16
            halves the size.
        shard_size: Samples per file. A process holds the samples of one file in memory.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    out: str = "precomputed"
    dtype: Literal["float32", "bfloat16"] = "float32"
    shard_size: int = 256

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigurationError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.shard_size < 1:
            raise ConfigurationError(f"shard_size is {self.shard_size}; set it to 1 or more samples")


def encode_dataset(model: LightningModule, data: LightningDataModule, options: PrecomputeOptions, fabric: Fabric) -> None:
    """Encode the images and prompts of the training and validation splits, and write them to shards.

    Loads the text encoders and the autoencoder, but not the transformer. The output does not depend on interruptions, or on the
    number of processes. A resumed run keeps complete shards and rewrites the others.

    Encodings equal those of training to the last bit: same precision, same batch size. Incomplete batches are padded with
    repeated samples: the last bits of a convolution depend on the batch size, though not on the other samples.

    Args:
        model: Method with an adapter.
        data: Data of the training run.
        options: Output directory and format.
        fabric: Devices, processes and precision.

    Raises:
        ConfigurationError: If the data or the encoders do not support precomputation, or `options.out` has other contents.
    """
    out = expand_path(options.out, "out")
    check_directory(out, "out")
    adapter, data = _check_inputs(model, data)
    # Checks precede the launch of other processes: each process raises the same errors, and none waits for an ended one.
    data.prepare_data()
    data.setup("fit")
    splits, precision = data.splits(), fabric.strategy.precision
    settings = _settings(adapter, data, options, precision)
    directory = EncodedDirectory(Path(out), settings, DTYPES[options.dtype])
    complete = directory.complete_shards()
    fabric.launch()
    if fabric.is_global_zero:
        directory.create()
    fabric.barrier()
    shards = _shard_ranges({split: len(dataset) for split, dataset in splits.items()}, options.shard_size)  # type: ignore[arg-type]
    missing = []
    for shard in shards[fabric.global_rank :: fabric.world_size]:
        entry = complete.get(shard.file)
        if entry is None:
            missing.append(shard)
        else:
            data.count_broken({"prompt": entry.sample_indices, "broken": [description for _, description in entry.broken]})
    needs_null = fabric.is_global_zero and not directory.has_null
    rank_zero_info(f"Precompute: {len(shards) - len(complete)} of {len(shards)} shards are missing in {directory.path}")
    if missing or needs_null:
        adapter.load()
        precision.convert_module(adapter).to(fabric.device)
        encoder = _SampleEncoder(adapter, precision, fabric.device, data.batch_size)
        if needs_null:
            directory.write_null(encoder.null())
        for split, dataset in splits.items():
            own = [shard for shard in missing if shard.split == split]
            buckets = data.training_buckets if split == "train" else None
            samples = _load_samples(dataset, own, data.num_workers)
            for shard in own:
                _encode_shard(shard, samples, data, encoder, buckets, directory)
                rank_zero_info(f"Precompute: wrote {shard.file}")
    with fabric.rank_zero_first():
        pass  # a barrier without the timeout of `Fabric.barrier`: processes may finish hours apart
    if fabric.is_global_zero:
        directory.complete(shards, complete)
    fabric.barrier()


def _check_inputs(model: LightningModule, data: LightningDataModule) -> tuple[ModelAdapter, ResumableData]:
    if not isinstance(model, TeacherStudentBase):
        raise ConfigurationError(f"model is {type(model).__name__}, which has no adapter; set model to a distillation method")
    if model.encoder.trains_text_encoders:
        raise ConfigurationError(
            "model.train_text_encoders is true, but training would change the precomputed conditions; set it to false"
        )
    if not isinstance(data, ResumableData) or isinstance(data, EncodedData):
        raise ConfigurationError(
            f"data is {type(data).__name__}, which has nothing to encode; set data to a DataModule of this package, or to a "
            "subclass of ResumableData"
        )
    model.adapter.check()
    model.adapter.check_teacher()
    check_image_sizes(model.adapter, model.validation, data)
    return model.adapter, data


def _settings(adapter: ModelAdapter, data: ResumableData, options: PrecomputeOptions, precision: Precision) -> dict[str, Any]:
    """All settings that determine the output, as JSON values."""
    own = {name: value for name, value in data.hparams.items() if name not in ("num_workers", "batch_size") and name[0] != "_"}
    settings = {
        **{f"adapter.{name}": value for name, value in adapter.encoding_settings().items()},
        "data": type(data).__name__,
        **{f"data.{name}": value for name, value in own.items()},
        "data.batch_size": data.batch_size,
        **{f"samples.{split}": len(dataset) for split, dataset in data.splits().items()},  # type: ignore[arg-type]
        "trainer.precision": str(precision.precision),
        "dtype": options.dtype,
        "shard_size": options.shard_size,
    }
    restored: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return restored


def _shard_ranges(lengths: dict[str, int], shard_size: int) -> list[ShardRange]:
    return [
        ShardRange(split, number, first, min(first + shard_size, samples) - 1)
        for split, samples in lengths.items()
        for number, first in enumerate(range(0, samples, shard_size))
    ]


class _SampleEncoder:
    def __init__(self, adapter: ModelAdapter, precision: Precision, device: torch.device, batch_size: int) -> None:
        self.adapter = adapter
        self.precision = precision
        self.device = device
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], images: Sequence[Tensor]) -> list[EncodedSample]:
        """Encode up to `batch_size` samples; there is one image (3, H, W) per prompt, or none at all."""
        padded = [i % len(prompts) for i in range(self.batch_size)]
        with self.precision.forward_context():
            condition = self.adapter.encode_prompt([prompts[i] for i in padded])
            latents = None
            if images:
                batch = torch.stack([images[i] for i in padded]).to(self.device)
                latents = self.adapter.encode_images(self.precision.convert_input(batch)).float().cpu()
        condition = {name: value.cpu() for name, value in condition.items()}
        return [
            EncodedSample(prompt, None if latents is None else latents[i], {name: each[i] for name, each in condition.items()})
            for i, prompt in enumerate(prompts)
        ]

    @torch.no_grad()
    def null(self) -> EncodedSample:
        """Encode the empty prompt: alone and without mixed precision, as in training."""
        return EncodedSample("", None, {name: value[0].cpu() for name, value in self.adapter.encode_prompt([""]).items()})


class _SingleSamples(Dataset[dict[str, Any]]):
    """Batches of one sample, so that a broken image does not affect other samples."""

    def __init__(self, dataset: BatchDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch: dict[str, Any] = self.dataset.__getitems__([index])  # type: ignore[attr-defined]
        return batch


def _identity_collate(batch: Any) -> Any:
    return batch


def _load_samples(dataset: BatchDataset, shards: Sequence[ShardRange], num_workers: int) -> Iterator[dict[str, Any]]:
    if not shards:
        return iter(())
    indices = [index for shard in shards for index in range(shard.first, shard.last + 1)]
    loader = DataLoader(
        _SingleSamples(dataset), batch_size=None, sampler=indices, num_workers=num_workers, collate_fn=_identity_collate
    )
    return iter(loader)


def _encode_shard(
    shard: ShardRange,
    samples: Iterator[dict[str, Any]],
    data: ResumableData,
    encoder: _SampleEncoder,
    buckets: Sequence[int] | None,
    directory: EncodedDirectory,
) -> None:
    """Encode the samples of a shard, in batches of one image size, and write the shard."""
    broken: list[tuple[int, str]] = []
    encoded: dict[int, EncodedSample] = {}
    pending: defaultdict[tuple[int, ...], list[tuple[int, str, Tensor | None]]] = defaultdict(list)

    def encode(size: tuple[int, ...]) -> None:
        indices, prompts, images = zip(*pending.pop(size), strict=True)
        found = encoder(prompts, [image for image in images if image is not None])
        for index, sample in zip(indices, found, strict=True):
            _check_finite(sample, index, shard.split)
            encoded[index] = sample

    image_sizes: set[tuple[int, int]] = set()
    for index in range(shard.first, shard.last + 1):
        batch = next(samples)
        descriptions = batch.get("broken", [])
        batch = data.count_broken(batch)
        if not batch["prompt"]:
            broken.append((index, descriptions[0]))
            continue
        (image,) = batch.get("image", [None])
        size = () if image is None else tuple(image.shape[1:])
        image_sizes |= {size} if size else set()
        pending[size].append((index, batch["prompt"][0], image))
        if len(pending[size]) == encoder.batch_size:
            encode(size)
    for size in list(pending):
        encode(size)
    stored = sorted(encoded)
    directory.write_shard(
        shard,
        [encoded[index] for index in stored],
        broken,
        None if buckets is None else [buckets[index] for index in stored],
        sorted(image_sizes),
    )


def _check_finite(sample: EncodedSample, index: int, split: str) -> None:
    """Raise `NonFiniteError` if a tensor of a sample is not finite, as where an encoder overflows in half precision."""
    latents = {} if sample.latents is None else {"the latents": sample.latents}
    for name, value in {**latents, **{f"the condition {name!r}": value for name, value in sample.condition.items()}}.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise NonFiniteError(
                f"{name} of {split} sample {index}, {sample.prompt[:80]!r}, became NaN or infinite in its encoder; set "
                "trainer.precision to bf16-true or 32-true, or remove the sample"
            )
