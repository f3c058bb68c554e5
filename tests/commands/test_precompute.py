"""`precompute`: what it writes, whatever interrupts it and however many share the work, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from lightning_distill.commands.main import main
from lightning_distill.commands.precompute import PrecomputeOptions, precompute
from lightning_distill.data import ImageText, Precomputed, ShapesData
from lightning_distill.data.encoded_shards import INDEX, NULL
from lightning_distill.errors import ConfigurationError
from lightning_distill.methods import Autoencoder, FlowMatching
from lightning_distill.teachers import DiffusersAdapter, EmbeddedFluxAdapter
from tests.callbacks.distillation import Ones, PictureDistillation
from tests.data.test_image_text import broken_shard, write_shard
from tests.precomputing import encode, write_config
from tests.tiny import save_tiny_pipeline, tiny_vae

ROOT = Path(__file__).resolve().parents[2]


def shapes(**settings: Any) -> ShapesData:
    return ShapesData(**{"size": 40, "batch_size": 4, "prompts_per_category": 2} | settings)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted run of one process."""
    return contents(encode(shapes(), tmp_path_factory.mktemp("whole") / "out"))


# Interruptions and processes


def test_an_uninterrupted_run_leaves_nothing_else(whole: dict[str, bytes]) -> None:
    shards = {f"train-{i:05}.safetensors" for i in range(6)} | {f"validation-{i:05}.safetensors" for i in range(2)}
    assert whole.keys() == {INDEX, NULL} | shards


@pytest.mark.parametrize("case", ["torn shard", "lost part", "lost shard", "no null", "only begun", "complete", "lost of all"])
def test_a_second_run_makes_what_is_missing_and_nothing_else(whole: dict[str, bytes], case: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if case in ("complete", "lost of all"):
        encode(shapes(), out)
    else:
        _interrupted(out)
    shard = out / "train-00002.safetensors"
    if case == "torn shard":
        shard.write_bytes(shard.read_bytes()[:-9])
        (out / f".{shard.name}.unfinished").write_bytes(b"half")
    elif case == "lost part":
        shard.with_suffix(".json").unlink()
    elif case in ("lost shard", "lost of all"):
        shard.unlink()
    elif case == "no null":
        (out / NULL).unlink()
    elif case == "only begun":
        for path in out.iterdir():
            if path.name != INDEX:
                path.unlink()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    encode(shapes(num_workers=1 if case == "lost shard" else 0), out)
    assert contents(out) == whole
    kept = [name for name, time in before.items() if (out / name).stat().st_mtime_ns == time]
    rewritten = {"torn shard": 1, "lost part": 1}.get(case, 0)
    assert len(kept) == len(before) - rewritten


def _interrupted(out: Path) -> None:
    """All shards, and the index that comes last not yet written."""
    encode(shapes(), out)
    index = json.loads((out / INDEX).read_text())
    for entry in (entry for shards in index["shards"].values() for entry in shards):
        (out / entry["file"]).with_suffix(".json").write_text(json.dumps(entry))
    (out / INDEX).write_text(json.dumps({**{name: index[name] for name in ("format", "settings")}, "complete": False}))


class ThreadedFabric(Fabric):
    """One of several processes, as a thread."""

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
        self.threads.wait(30)

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        yield
        self.barrier()


@pytest.mark.parametrize("processes", [2, 5])
def test_what_is_written_does_not_depend_on_the_number_of_processes(
    whole: dict[str, bytes], processes: int, tmp_path: Path
) -> None:
    barrier = threading.Barrier(processes)
    options = PrecomputeOptions(out=str(tmp_path / "out"), shard_size=7)
    threads = [
        threading.Thread(target=precompute, args=(PictureDistillation(), shapes(), options, ThreadedFabric(rank, barrier)))
        for rank in range(processes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert contents(tmp_path / "out") == whole


KILLER = """
import os, signal
from lightning_distill.data import ShapesData, ShapesDataset

class Fragile(ShapesDataset):
    def __getitems__(self, indices):
        if indices == [17] and "KILL" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitems__(indices)

class FragileShapes(ShapesData):
    def splits(self):
        train = self.ready(self._train)
        return super().splits() | {"train": Fragile(train.texts, train.images)}
"""


def test_a_killed_run_goes_on_to_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("killer.py").write_text(KILLER)
    write_config(tmp_path, data={"class_path": "killer.FragileShapes", "init_args": {"size": 30, "batch_size": 6}})
    teacher = save_tiny_pipeline(tmp_path / "teacher")
    command = ["precompute", "--config=run.yaml", "--shard_size=8", f"--model.adapter.pretrained={teacher}"]
    process = subprocess.run(
        [sys.executable, "-m", "lightning_distill", *command, "--out=killed"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "KILL": "1"},
        capture_output=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    before = contents(Path("killed"))
    assert {"train-00000.safetensors", "train-00001.safetensors"} == {
        name for name in before if name.startswith("train") and "safe" in name
    }
    main([*command, "--out=killed"])
    main([*command, "--out=whole"])
    after = contents(Path("killed"))
    assert after == contents(Path("whole"))
    assert all(after[name] == before[name] for name in before if name.endswith(".safetensors"))


@pytest.mark.slow
def test_two_processes_of_lightning_share_the_work(tmp_path: Path) -> None:
    write_config(tmp_path)
    command = [sys.executable, "-m", "lightning_distill", "precompute", "--config=run.yaml", "--shard_size=8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for devices in (1, 2):
        further = [f"--out=out{devices}", f"--trainer.devices={devices}"]
        subprocess.run([*command, *further], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


# What is refused


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["precompute", *arguments])
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return errors[errors.index("error: ") :]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype=float8"], "dtype"),
        (["--shard_size=0"], "shard_size is 0; set it to 1 or more samples"),
        (["--config=none.yaml"], "config 'none.yaml' is neither a file"),
        (["--data.size=2"], "data.batch_size 6 is larger than data.size 2"),
        (["--model.adapter.pretrained=nowhere"], "neither a pipeline directory nor a hub id"),
        (["--model.adapter.torch_dtype=float8"], "adapter.torch_dtype is 'float8'"),
        (["--out=occupied/notes.txt"], "out is 'occupied/notes.txt', which is a file; choose a directory"),
        (["--out=occupied"], "out is 'occupied', which holds something other than precomputed data"),
        (["--trainer.accelerator=cuda"], "trainer.accelerator is 'cuda', and 'auto' or 'cpu' runs without a GPU"),
    ],
)
def test_settings_that_cannot_work(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "cuda" in arguments[0] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusersAdapter, "load", lambda *args, **kwargs: pytest.fail("loaded"))
    write_config(tmp_path)
    Path("occupied").mkdir()
    Path("occupied", "notes.txt").write_text("mine")
    sentence = refused(capsys, "--config=run.yaml", *arguments)
    assert message in sentence
    assert not Path("precomputed").exists()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"size": 41}, {}, r"begun with data\.size 40, and it is 41 now"),
        ({"seed": 1}, {}, r"begun with data\.seed 0, and it is 1 now"),
        ({"batch_size": 5}, {}, r"begun with data\.batch_size 4, and it is 5 now"),
        ({}, {"shard_size": 9}, "begun with shard_size 7, and it is 9 now"),
        ({}, {"dtype": "bfloat16"}, "begun with dtype 'float32', and it is 'bfloat16' now"),
    ],
)
def test_a_directory_of_other_settings_is_refused(
    change: dict[str, int], options: dict[str, Any], message: str, whole: dict[str, bytes], tmp_path: Path
) -> None:
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        encode(shapes(**change), tmp_path, **options)
    assert contents(tmp_path) == whole


def test_another_teacher_is_refused(whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr("tests.callbacks.distillation.PictureAdapter.encoding_settings", lambda self: {"family": "other"})
    with pytest.raises(ConfigurationError, match=r"begun with adapter\.family 'pictures', and it is 'other' now"):
        encode(shapes(), tmp_path)


def test_what_cannot_be_encoded_beforehand(tmp_path: Path) -> None:
    def refuse(model: Any, data: Any, message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            precompute(model, data, PrecomputeOptions(str(tmp_path / "out")), Fabric(accelerator="cpu", devices=1))

    teacher = DiffusersAdapter("shapes-teacher")
    refuse(Autoencoder(), shapes(), "model is Autoencoder, which has no adapter")
    refuse(FlowMatching(teacher, train_text_encoders=True), shapes(), r"model\.train_text_encoders is true")
    refuse(PictureDistillation(), Ones(), "data is Ones, which has nothing to encode")
    refuse(PictureDistillation(), Precomputed("x"), "data is Precomputed, which has nothing to encode")
    tiny_vae().save_pretrained(tmp_path / "vae")
    refuse(FlowMatching(EmbeddedFluxAdapter(str(tmp_path / "vae"), ["a"])), shapes(), "draws its text encoders anew")
    assert not (tmp_path / "out").exists()


def test_too_many_broken_pictures_end_it_after_a_resume_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lengths(self: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
        return {"picture": torch.tensor([[float(len(prompt))] for prompt in prompts])}

    monkeypatch.setattr("tests.callbacks.distillation.PictureAdapter.encode_prompt", lengths)
    monkeypatch.setattr("lightning_distill.data.image_text.ENOUGH", 20)
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "000.tar", 0, 24)
    broken_shard(tmp_path, 6)
    write_shard(tmp_path / "validation.tar", 0, 3)
    sources = {"source": str(tmp_path / "shards" / "*.tar"), "validation_source": str(tmp_path / "validation.tar")}
    sizes = {"height": 32, "width": 32, "multiple": 8, "batch_size": 2, "num_workers": 0}
    for _ in range(2):
        with (
            pytest.warns(UserWarning, match="ImageText leaves out broken"),
            pytest.raises(ConfigurationError, match=r"of 2. pictures cannot be read, more than data\.max_broken_share 0\.1"),
        ):
            encode(ImageText(**sources, **sizes, max_broken_share=0.1), tmp_path / "out")
