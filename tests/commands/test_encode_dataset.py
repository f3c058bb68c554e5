import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from lightning_distill.commands.encode_dataset import PrecomputeOptions, encode_dataset
from lightning_distill.data import ImageText, Precomputed, ShapesData
from lightning_distill.data.encoded_index import INDEX, EncodedIndex
from lightning_distill.data.encoded_shards import NULL
from lightning_distill.errors import ConfigurationError, NonFiniteError
from lightning_distill.methods import Autoencoder, FlowMatching
from lightning_distill.teachers import DiffusersAdapter, EmbeddedFluxAdapter
from tests.callbacks.distillation import Ones, PixelDistillation
from tests.data.test_image_text import write_broken_shard, write_shard
from tests.precomputing import encode
from tests.tiny import tiny_vae


def shapes(**settings: Any) -> ShapesData:
    return ShapesData(**{"size": 40, "batch_size": 4, "prompts_per_category": 2} | settings)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of an uninterrupted run in one process."""
    return contents(encode(shapes(), tmp_path_factory.mktemp("complete") / "out"))


# Interruptions and processes


def test_an_uninterrupted_run_leaves_only_shards_index_and_null(complete: dict[str, bytes]) -> None:
    shards = {f"train-{i:05}.safetensors" for i in range(6)} | {f"validation-{i:05}.safetensors" for i in range(2)}
    assert complete.keys() == {INDEX, NULL} | shards


@pytest.mark.parametrize(
    "case",
    [
        "truncated shard",
        "lost entry",
        "damaged entry",
        "entry of another shard",
        "lost shard",
        "no null",
        "index only",
        "complete",
        "complete without a shard",
    ],
)
def test_a_second_run_writes_only_missing_files(complete: dict[str, bytes], case: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode(shapes(), out)
    if not case.startswith("complete"):
        _undo_completion(out)
    shard = out / "train-00002.safetensors"
    if case == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-9])
        (out / f".{shard.name}.unfinished").write_bytes(b"half")
    elif case == "lost entry":
        shard.with_suffix(".json").unlink()
    elif case == "damaged entry":
        shard.with_suffix(".json").write_text('{"file": ')
    elif case == "entry of another shard":
        shard.with_suffix(".json").write_bytes((out / "train-00001.json").read_bytes())
    elif case in ("lost shard", "complete without a shard"):
        shard.unlink()
    elif case == "no null":
        (out / NULL).unlink()
    elif case == "index only":
        for path in out.iterdir():
            if path.name != INDEX:
                path.unlink()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    encode(shapes(num_workers=1 if case == "lost shard" else 0), out)
    assert contents(out) == complete
    kept = [name for name, time in before.items() if (out / name).stat().st_mtime_ns == time]
    rewritten = 1 if case in ("truncated shard", "lost entry", "damaged entry", "entry of another shard") else 0
    assert len(kept) == len(before) - rewritten


def _undo_completion(out: Path) -> None:
    """Restore the state before the last step: one entry file per shard, and an incomplete index."""
    index = json.loads((out / INDEX).read_text())
    for entry in (entry for shards in index["shards"].values() for entry in shards):
        (out / entry["file"]).with_suffix(".json").write_text(json.dumps(entry))
    EncodedIndex(index["settings"]).write(out)


class ThreadedFabric(Fabric):
    """One of several processes, simulated by a thread."""

    def __init__(self, rank: int, barrier: threading.Barrier) -> None:
        super().__init__(accelerator="cpu", devices=1)
        self.rank = rank
        self.threads = barrier

    @property
    def global_rank(self) -> int:
        return self.rank

    @property
    def world_size(self) -> int:
        return self.threads.parties

    @property
    def is_global_zero(self) -> bool:
        return self.rank == 0

    def barrier(self, name: str | None = None) -> None:
        self.threads.wait(60)

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        yield
        self.barrier()


@pytest.mark.parametrize("processes", [2, 5])
def test_output_does_not_depend_on_the_number_of_processes(complete: dict[str, bytes], processes: int, tmp_path: Path) -> None:
    barrier = threading.Barrier(processes)
    options = PrecomputeOptions(out=str(tmp_path / "out"), shard_size=7)
    with ThreadPoolExecutor(processes) as pool:
        runs = [
            pool.submit(encode_dataset, PixelDistillation(), shapes(), options, ThreadedFabric(rank, barrier))
            for rank in range(processes)
        ]
        for run in as_completed(runs):
            if run.exception() is not None:
                barrier.abort()
    for run in runs:
        if not isinstance(run.exception(), threading.BrokenBarrierError):
            run.result()
    assert contents(tmp_path / "out") == complete


# Errors


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"size": 41}, {}, r"has data with data\.size 40, but data\.size is 41 now"),
        ({"seed": 1}, {}, r"has data with data\.seed 0, but data\.seed is 1 now"),
        ({"batch_size": 5}, {}, r"has data with data\.batch_size 4, but data\.batch_size is 5 now"),
        ({}, {"shard_size": 9}, "has data with shard_size 7, but shard_size is 9 now"),
        ({}, {"dtype": "bfloat16"}, "has data with dtype 'float32', but dtype is 'bfloat16' now"),
    ],
)
def test_a_directory_with_data_of_other_settings_raises(
    change: dict[str, int], options: dict[str, Any], message: str, complete: dict[str, bytes], tmp_path: Path
) -> None:
    for name, content in complete.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        encode(shapes(**change), tmp_path, **options)
    assert contents(tmp_path) == complete


def test_a_directory_with_data_of_another_teacher_raises(
    complete: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in complete.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr("tests.callbacks.distillation.PixelAdapter.encoding_settings", lambda self: {"family": "other"})
    with pytest.raises(ConfigurationError, match=r"has data with adapter\.family 'pixels', but adapter\.family is 'other' now"):
        encode(shapes(), tmp_path)


def test_unsupported_models_and_data_raise(tmp_path: Path) -> None:
    def check(model: Any, data: Any, message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            encode_dataset(model, data, PrecomputeOptions(str(tmp_path / "out")), Fabric(accelerator="cpu", devices=1))

    teacher = DiffusersAdapter("shapes-teacher")
    check(Autoencoder(), shapes(), "model is Autoencoder, which has no adapter")
    check(FlowMatching(teacher, train_text_encoders=True), shapes(), r"model\.train_text_encoders is true")
    check(PixelDistillation(), Ones(), "data is Ones, which has nothing to encode")
    check(PixelDistillation(), Precomputed("x"), "data is Precomputed, which has nothing to encode")
    tiny_vae().save_pretrained(tmp_path / "vae")
    check(FlowMatching(EmbeddedFluxAdapter(str(tmp_path / "vae"), ["a"])), shapes(), "text encoders get new random weights")
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_counts_the_broken_images_of_earlier_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lengths(self: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
        return {"image": torch.tensor([[float(len(prompt))] for prompt in prompts])}

    monkeypatch.setattr("tests.callbacks.distillation.PixelAdapter.encode_prompt", lengths)
    monkeypatch.setattr("lightning_distill.data.image_text.MIN_SAMPLES_FOR_SHARE", 20)
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "000.tar", 0, 24)
    write_broken_shard(tmp_path, 6)
    write_shard(tmp_path / "validation.tar", 0, 3)
    sources = {"source": str(tmp_path / "shards" / "*.tar"), "validation_source": str(tmp_path / "validation.tar")}
    sizes = {"height": 32, "width": 32, "multiple": 8, "batch_size": 2, "num_workers": 0}
    for _ in range(2):
        with (
            pytest.warns(UserWarning, match="ImageText skips broken"),
            pytest.raises(ConfigurationError, match=r"of 2. images cannot be decoded, more than data\.max_broken_share 0\.1"),
        ):
            encode(ImageText(**sources, **sizes, max_broken_share=0.1), tmp_path / "out")


@pytest.mark.parametrize("part", ["images", "prompts"])
def test_encodings_that_are_not_finite_raise_and_name_the_sample(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = "tests.callbacks.distillation.PixelAdapter"
    if part == "images":
        monkeypatch.setattr(f"{adapter}.encode_images", lambda self, images: torch.where(images > 0.9, torch.nan, images))
    else:
        monkeypatch.setattr(
            f"{adapter}.encode_prompt", lambda self, prompts: {"image": torch.full((len(prompts), 1), torch.inf)}
        )
    name = "the latents" if part == "images" else "the condition 'image'"
    with pytest.raises(NonFiniteError, match=rf"^{name} of train sample \d+, '.*', became NaN or infinite in its encoder; set"):
        encode(shapes(), tmp_path / "out")
    assert not list((tmp_path / "out").glob("train*"))
