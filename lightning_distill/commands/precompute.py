"""`python -m lightning_distill precompute`: latents and conditions of a data set, written once."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import Precision
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_distill.data.encoded_shards import (
    INDEX,
    NULL,
    EncodedIndex,
    EncodedSample,
    EncodedShard,
    file_digest,
    read_entry,
    unfinished,
    write_atomically,
    write_samples,
)
from lightning_distill.data.resumable import Batches, ResumableData
from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.methods.condition import EncodedData
from lightning_distill.teachers.model_adapter import ModelAdapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ENTRY = ".json"
"""Ending of the files that hold a shard's part of the index until all shards are there."""


@dataclass(frozen=True)
class PrecomputeOptions:
    """What is written, and where.

    Args:
        out: Directory to write to, or one that was begun with the same settings, to go on.
        dtype: Highest precision that is kept: with float32 training is equal to training from pictures, bfloat16 takes half the
            room. What is of lower precision stays so.
        shard_size: Samples a file. A process holds one file's in memory.

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


def precompute(model: LightningModule, data: LightningDataModule, options: PrecomputeOptions, fabric: Fabric) -> None:
    """Encode the pictures and prompts that a method would train and validate on.

    Text encoders and autoencoder are loaded, the transformer is not. What is written does not depend on the number of processes
    that share the shards, or on interruptions: whole shards are kept, others begun again.

    All is encoded as training encodes it, in the same precision and in batches of `data.batch_size`, which are filled up by
    repetition: the last bits of a convolution depend on the number of samples, though not on which they are.

    Args:
        model: The method, for its adapter.
        data: What it would train on.
        options: What is written, and where.
        fabric: Devices, processes and precision.

    Raises:
        ConfigurationError: If something cannot be encoded beforehand, or the directory holds something else.
    """
    adapter, data = _checked(model, data)
    # All this before there are other processes: each finds the same errors, and none waits for one that has ended.
    data.prepare_data()
    data.setup("fit")
    splits, directory, precision = data.splits(), Path(options.out), fabric.strategy.precision
    settings = _settings(adapter, data, options, precision)
    known = _known(directory, settings)
    fabric.launch()
    if fabric.is_global_zero and not (directory / INDEX).is_file():
        directory.mkdir(parents=True, exist_ok=True)
        EncodedIndex(settings).write(directory)
    fabric.barrier()
    stretches = [
        _Stretch(split, number, first, min(first + options.shard_size, samples) - 1)
        for split, samples in ((split, len(dataset)) for split, dataset in splits.items())  # type: ignore[arg-type]
        for number, first in enumerate(range(0, samples, options.shard_size))
    ]
    missing = []
    for stretch in stretches[fabric.global_rank :: fabric.world_size]:
        entry = known.get(stretch.file)
        if entry is None:
            missing.append(stretch)
        else:
            data.count_broken({"prompt": entry.places, "broken": [description for _, description in entry.broken]})
    makes_null = fabric.is_global_zero and not (directory / NULL).is_file()
    rank_zero_info(f"Precompute: {len(stretches) - len(known)} of {len(stretches)} shards are to be written to {directory}")
    if missing or makes_null:
        adapter.load()
        precision.convert_module(adapter).to(fabric.device)
        encoder = _Encoder(adapter, precision, fabric.device, data.batch_size)
        if makes_null:
            write_samples(directory / NULL, [encoder.null()], DTYPES[options.dtype])
        for split, dataset in splits.items():
            own = [stretch for stretch in missing if stretch.split == split]
            buckets = data.training_buckets if split == "train" else None
            samples = _read(dataset, own, data.num_workers)
            for stretch in own:
                _write(directory, stretch, samples, data, encoder, buckets, DTYPES[options.dtype])
                rank_zero_info(f"Precompute: wrote {stretch.file}")
    with fabric.rank_zero_first():
        pass  # a barrier, without the time limit of Fabric's own: processes may come to their ends hours apart
    if fabric.is_global_zero:
        _finish(directory, settings, stretches, known)
    fabric.barrier()


@dataclass(frozen=True)
class _Stretch:
    split: str
    number: int
    first: int
    last: int

    @property
    def file(self) -> str:
        return f"{self.split}-{self.number:05}.safetensors"


def _checked(model: LightningModule, data: LightningDataModule) -> tuple[ModelAdapter, ResumableData]:
    if not isinstance(model, TeacherStudentBase):
        raise ConfigurationError(f"model is {type(model).__name__}, which has no adapter that encodes; give a method that has")
    if model.train_text_encoders:
        raise ConfigurationError(
            "model.train_text_encoders is true, so that what they make now is not what they make later; set it to false"
        )
    if not isinstance(data, ResumableData) or isinstance(data, EncodedData):
        raise ConfigurationError(
            f"data is {type(data).__name__}, which has nothing to encode; give a DataModule of this package, or one that "
            "extends ResumableData"
        )
    model.adapter.check()
    return model.adapter, data


def _settings(adapter: ModelAdapter, data: ResumableData, options: PrecomputeOptions, precision: Precision) -> dict[str, Any]:
    """All that what is written depends on, in the types that JSON gives back."""
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


def _known(directory: Path, settings: Mapping[str, Any]) -> dict[str, EncodedShard]:
    """The whole shards in a directory by their files.

    Raises:
        ConfigurationError: If it holds something else.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigurationError(f"out is {str(directory)!r}, which is a file; choose a directory")
    if not (directory / INDEX).is_file():
        if directory.is_dir() and any(path.name != unfinished(directory / INDEX).name for path in directory.iterdir()):
            raise ConfigurationError(
                f"out is {str(directory)!r}, which holds something other than precomputed data; choose another directory"
            )
        return {}
    index = EncodedIndex.read(directory, "out")
    for name in {**index.settings, **settings}:
        made, asked = (there.get(name) for there in (index.settings, settings))
        if made != asked:
            raise ConfigurationError(
                f"out is {str(directory)!r}, which was begun with {name} {made!r}, and it is {asked!r} now; choose another "
                "directory, or the settings that it was begun with"
            )
    entries = [entry for shards in index.shards.values() for entry in shards]
    entries += [read_entry(json.loads(path.read_text())) for path in directory.glob(f"*{ENTRY}") if path.name != INDEX]
    found = {entry.file: entry for entry in entries if (directory / entry.file).is_file()}
    return {file: entry for file, entry in found.items() if (directory / file).stat().st_size == entry.size}


class _Encoder:
    def __init__(self, adapter: ModelAdapter, precision: Precision, device: torch.device, batch_size: int) -> None:
        self.adapter = adapter
        self.precision = precision
        self.device = device
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], images: Sequence[Tensor]) -> list[EncodedSample]:
        """Encode up to a batch of samples; there are as many images as prompts, or none."""
        filled = [i % len(prompts) for i in range(self.batch_size)]
        with self.precision.forward_context():
            condition = self.adapter.encode_prompt([prompts[i] for i in filled])
            latents = None
            if images:
                pictures = torch.stack([images[i] for i in filled]).to(self.device)
                latents = self.adapter.encode_images(self.precision.convert_input(pictures)).float().cpu()
        condition = {name: value.cpu() for name, value in condition.items()}
        return [
            EncodedSample(prompt, None if latents is None else latents[i], {name: each[i] for name, each in condition.items()})
            for i, prompt in enumerate(prompts)
        ]

    @torch.no_grad()
    def null(self) -> EncodedSample:
        """The empty prompt, by itself and not in mixed precision, as training encodes it."""
        return EncodedSample("", None, {name: value[0].cpu() for name, value in self.adapter.encode_prompt([""]).items()})


class _Singly(Dataset[dict[str, Any]]):
    """Samples one by one, so that a broken picture leaves the others alone."""

    def __init__(self, dataset: Batches) -> None:
        self.dataset = dataset

    def __getitem__(self, place: int) -> dict[str, Any]:
        batch: dict[str, Any] = self.dataset.__getitems__([place])  # type: ignore[attr-defined]
        return batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _read(dataset: Batches, stretches: Sequence[_Stretch], num_workers: int) -> Iterator[dict[str, Any]]:
    if not stretches:
        return iter(())
    places = [place for stretch in stretches for place in range(stretch.first, stretch.last + 1)]
    loader = DataLoader(_Singly(dataset), batch_size=None, sampler=places, num_workers=num_workers, collate_fn=_as_it_is)
    return iter(loader)


def _write(
    directory: Path,
    stretch: _Stretch,
    samples: Iterator[dict[str, Any]],
    data: ResumableData,
    encoder: _Encoder,
    buckets: Sequence[int] | None,
    dtype: torch.dtype,
) -> None:
    """Encode the samples of a stretch and write them, with their part of the index beside them."""
    broken: list[tuple[int, str]] = []
    encoded: dict[int, EncodedSample] = {}
    waiting: defaultdict[tuple[int, ...], list[tuple[int, str, Tensor | None]]] = defaultdict(list)

    def encode(size: tuple[int, ...]) -> None:
        places, prompts, images = zip(*waiting.pop(size), strict=True)
        pictures = [image for image in images if image is not None]
        encoded.update(zip(places, encoder(prompts, pictures), strict=True))

    sizes: set[tuple[int, int]] = set()
    for place in range(stretch.first, stretch.last + 1):
        batch = next(samples)
        descriptions = batch.get("broken", [])
        batch = data.count_broken(batch)
        if not batch["prompt"]:
            broken.append((place, descriptions[0]))
            continue
        (image,) = batch.get("image", [None])
        size = () if image is None else tuple(image.shape[1:])
        sizes |= {size} if size else set()
        waiting[size].append((place, batch["prompt"][0], image))
        if len(waiting[size]) == encoder.batch_size:
            encode(size)
    for size in list(waiting):
        encode(size)
    sha256, bytes_written = write_samples(directory / stretch.file, [encoded[place] for place in sorted(encoded)], dtype)
    entry = EncodedShard(
        file=stretch.file,
        sha256=sha256,
        size=bytes_written,
        first=stretch.first,
        last=stretch.last,
        broken=broken,
        buckets=None if buckets is None else [buckets[place] for place in sorted(encoded)],
        image_sizes=sorted(sizes),
    )
    write_atomically(_entry_file(directory, stretch), json.dumps(asdict(entry)).encode())


def _entry_file(directory: Path, stretch: _Stretch) -> Path:
    return (directory / stretch.file).with_suffix(ENTRY)


def _finish(
    directory: Path, settings: dict[str, Any], stretches: Sequence[_Stretch], known: Mapping[str, EncodedShard]
) -> None:
    """Put the index together, and remove its parts."""
    shards: dict[str, list[EncodedShard]] = {}
    for stretch in stretches:
        path = _entry_file(directory, stretch)
        entry = read_entry(json.loads(path.read_text())) if path.is_file() else known[stretch.file]
        shards.setdefault(stretch.split, []).append(entry)
    null = directory / NULL
    EncodedIndex(settings, shards, (file_digest(null), null.stat().st_size)).write(directory)
    for stretch in stretches:
        _entry_file(directory, stretch).unlink(missing_ok=True)
    entries = [entry for parts in shards.values() for entry in parts]
    rank_zero_info(
        f"Precomputed {sum(len(entry.places) for entry in entries)} samples in {len(entries)} shards in {directory}; "
        f"{sum(len(entry.broken) for entry in entries)} broken ones are left out"
    )
