"""Faults and what happens: a campaign that kills, signals and starves trainings, and damages what is on the disk.

`python benchmarks/faults.py` runs all kinds and writes `benchmarks/results/faults_<machine>.json` and a table. `--kinds`
selects kinds, `--tries` sets the number of tries of a kind, `--seed` the random points. Rows of other kinds in the file of a
machine are preserved. A try passes if the right thing happened:

* a killed or signalled training, resumed by `--ckpt_path last`, repeats the losses of the uninterrupted one bit for bit; a
  signal that announces the end loses no step;
* damaged files are refused in one line, or they change nothing: the losses or the image equal those of the undamaged files;
* a full disk ends the training in one line that says so, leaves no part of a file, and the training resumes when there is room;
* damaged images are read, or left out and counted; none ends the program by another exception.
"""

import argparse
import datetime
import io
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fault_runs import STEPS, Command, Finished, cut, flip_bit, losses, pick, preload, run, write_config
from PIL import Image

from lightning_distill.data import ImageFolder, ImageText
from lightning_distill.data.image_text_dataset import ImageTextDataset
from lightning_distill.errors import ConfigurationError

RESULTS = Path(__file__).resolve().parent / "results"
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
STRATEGIES = ("ddp", "fsdp2", "deepspeed_stage_3")
Damage = Callable[[bytes, random.Random], bytes]


@dataclass
class Row:
    """Result of a kind of fault.

    Attributes:
        kind: Name of the kind.
        fault: What was done.
        expected: What has to happen.
        tried: Number of tries.
        passed: Number of tries with the expected result.
        refused: Number of tries that ended in one line.
        failures: Descriptions of the first failures.
    """

    kind: str
    fault: str
    expected: str
    tried: int = 0
    passed: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, failure: str | None, refused: bool = False) -> None:
        """Count a try; None means that it passed."""
        self.tried += 1
        self.refused += refused
        self.passed += failure is None
        if failure is not None and len(self.failures) < 5:
            self.failures.append(failure)


class Campaign:
    """Directories that the kinds share: an uninterrupted training, and copies of it.

    Args:
        place: Directory for all files.
        generator: Source of all random points.
    """

    def __init__(self, place: Path, generator: random.Random) -> None:
        self.place = place
        self.random = generator
        self._complete: dict[str, tuple[Path, float]] = {}

    def complete(self, strategy: str = "auto") -> Path:
        """Directory of an uninterrupted training under a strategy."""
        return self._train(strategy)[0]

    def duration(self, strategy: str = "auto") -> float:
        """Seconds that the uninterrupted training took."""
        return self._train(strategy)[1]

    def empty(self, strategy: str = "auto") -> Path:
        """A new directory with the settings of the training."""
        directory = Path(tempfile.mkdtemp(dir=self.place))
        write_config(directory, 1 if strategy == "auto" else 2, strategy)
        return directory

    def copy(self, strategy: str = "auto") -> Path:
        """A new directory with the files of the uninterrupted training, without its losses."""
        directory = Path(tempfile.mkdtemp(dir=self.place))
        shutil.copytree(self.complete(strategy), directory, dirs_exist_ok=True, symlinks=True)
        (directory / "losses.jsonl").unlink()
        return directory

    def fit(self, directory: Path, *arguments: str, strategy: str = "auto") -> Finished:
        """Run the training in a directory to its end."""
        return run(directory, "fit", "--config", "run.yaml", *arguments, fork=strategy == "auto")

    def _train(self, strategy: str) -> tuple[Path, float]:
        if strategy not in self._complete:
            directory = self.empty(strategy)
            finished = self.fit(directory, strategy=strategy)
            if finished.code != 0:
                raise RuntimeError(f"the uninterrupted training failed:\n{finished.output[-3000:]}")
            self._complete[strategy] = directory, finished.seconds
        return self._complete[strategy]

    def interrupted(self, number: signal.Signals, strategy: str = "auto") -> str | None:
        """Interrupt a training at a random time by a signal, resume it, and compare the losses; returns the failure.

        A signal other than SIGKILL is sent after the first step, so that the training has installed its handlers.
        """
        expected = losses(self.complete(strategy))
        directory = self.empty(strategy)
        command = Command(directory, ("fit", "--config", "run.yaml"), fork=strategy == "auto")
        if number != signal.SIGKILL:
            while command.running and not losses(directory):
                time.sleep(0.005)
            time.sleep(self.random.uniform(0.0, 0.3 * self.duration(strategy)))
        else:
            time.sleep(self.random.uniform(0.0, self.duration(strategy)))
        command.send(number)
        ended = command.wait()
        before = losses(directory)
        if ended.code == 0:
            return None if before == expected else "it ended before the signal, with other losses"
        if number != signal.SIGKILL and (ended.code is None or ended.code < 0):
            return f"exit code {ended.code} after {number.name}"
        if before != expected[: len(before)]:
            return "the losses before the interruption differ"
        resumed = self.fit(directory, "--ckpt_path", "last", strategy=strategy)
        after = losses(directory)[len(before) :]
        if number == signal.SIGKILL and resumed.refused and not list(directory.rglob("*.ckpt")):
            return None  # killed before the first checkpoint; the message says that there is none
        if resumed.code != 0:
            return f"the resumed training ended with {resumed.code}: {resumed.last_line}"
        if number != signal.SIGKILL and len(before) + len(after) != STEPS:
            return f"{len(before)} steps before {number.name} and {len(after)} after it, of {STEPS}"
        return None if after == expected[STEPS - len(after) :] else "the losses of the resumed training differ"


def kills(campaign: Campaign, tries: int) -> Iterator[Row]:
    """SIGKILL at random times of a training, its start and its checkpoints included."""
    row = Row("kill -9", "SIGKILL at a random time", "resumed from the last checkpoint: the same losses, bit for bit")
    for _ in range(tries):
        row.add(campaign.interrupted(signal.SIGKILL))
        yield row


def signals(campaign: Campaign, tries: int) -> Iterator[Row]:
    """Signals that announce the end, at random times after the first step."""
    row = Row("signals", "SIGTERM, SIGINT, SIGHUP or SIGUSR1 at a random time", "no step is lost; the same losses, bit for bit")
    for index in range(tries):
        row.add(campaign.interrupted(ENDING_SIGNALS[index % len(ENDING_SIGNALS)]))
        yield row


def checkpoints(campaign: Campaign, tries: int) -> Iterator[Row]:
    """Damaged checkpoint files."""
    for name, damage, fault in (("bit flips", flip_bit, "one random bit changed"), ("cuts", cut, "cut at a random length")):
        row = Row(f"checkpoint, {name}", f"a checkpoint with {fault}", "refused in one line, or the same losses")
        for _ in range(tries):
            directory = campaign.copy()
            states = sorted(path for path in (directory / "run/checkpoints").glob("*.ckpt") if not path.is_symlink())
            file = min(states, key=lambda path: path.stat().st_mtime)  # an earlier state, so that steps are left to train
            file.write_bytes(damage(file.read_bytes(), campaign.random))
            finished = campaign.fit(directory, "--ckpt_path", str(file))
            trained = losses(directory)
            expected = losses(campaign.complete())
            same = finished.code == 0 and trained == expected[STEPS - len(trained) :]
            row.add(None if finished.refused or same else f"{finished.code}: {finished.last_line}", finished.refused)
            shutil.rmtree(directory)
            yield row


def exports(campaign: Campaign, tries: int) -> Iterator[Row]:
    """Damaged pipeline directories."""
    arguments = ("sample", "--pipeline", "run/student", "--prompt", "a red circle", "--nfe", "1", "--out", "image.png")
    reference = campaign.copy()
    finished = run(reference, *arguments)
    if finished.code != 0:
        raise RuntimeError(f"`sample` failed with the undamaged student:\n{finished.output[-3000:]}")
    image = np.asarray(Image.open(reference / "image.png"))
    for name, damage, fault in (("bit flips", flip_bit, "one random bit changed"), ("cuts", cut, "cut at a random length")):
        row = Row(f"student, {name}", f"a file of an exported student with {fault}", "refused in one line, or the same image")
        for _ in range(tries):
            directory = campaign.copy()
            file = pick([path for path in (directory / "run/student").rglob("*") if path.is_file()], campaign.random)
            file.write_bytes(damage(file.read_bytes(), campaign.random))
            finished = run(directory, *arguments)
            same = finished.code == 0 and np.array_equal(np.asarray(Image.open(directory / "image.png")), image)
            row.add(
                None if finished.refused or same else f"{file.name}: {finished.code}: {finished.last_line}", finished.refused
            )
            shutil.rmtree(directory)
            yield row


def latents(campaign: Campaign, tries: int) -> Iterator[Row]:
    """Damaged directories of precomputed latents."""
    reference = campaign.empty()
    options = ("--data", "Precomputed", "--data.directory", "latents", "--data.batch_size", "4")
    for finished in (
        run(reference, "precompute", "--config", "run.yaml", "--out", "latents"),
        campaign.fit(reference, *options),
    ):
        if finished.code != 0:
            raise RuntimeError(f"training from undamaged latents failed:\n{finished.output[-3000:]}")
    expected = losses(reference)
    for name, damage, fault in (("bit flips", flip_bit, "one random bit changed"), ("cuts", cut, "cut at a random length")):
        row = Row(f"latents, {name}", f"a file of precomputed latents with {fault}", "refused in one line, or the same losses")
        for _ in range(tries):
            directory = campaign.empty()
            shutil.copytree(reference / "latents", directory / "latents")
            file = pick([path for path in (directory / "latents").iterdir() if path.is_file()], campaign.random)
            file.write_bytes(damage(file.read_bytes(), campaign.random))
            finished = campaign.fit(directory, *options)
            same = finished.code == 0 and losses(directory) == expected
            row.add(
                None if finished.refused or same else f"{file.name}: {finished.code}: {finished.last_line}", finished.refused
            )
            shutil.rmtree(directory)
            yield row


def full_disk(campaign: Campaign, tries: int) -> Iterator[Row]:
    """Disks that are full at a random point of a training; needs root, to mount them."""
    row = Row("full disk", "a disk that is full at a random point", "one line that says so, no partial file; resumed with room")
    size = sum(
        path.stat().st_size for path in (campaign.complete() / "run").rglob("*") if path.is_file() and not path.is_symlink()
    )
    for _ in range(tries):
        directory = campaign.empty()
        disk = directory / "run"
        disk.mkdir()
        kibibytes = max(64, int(campaign.random.uniform(0.05, 0.95) * size / 1024))
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(disk)], capture_output=True)
        if mounted.returncode != 0:
            print("full disk: skipped, since mounting a small disk needs root")
            return
        try:
            row.add(_fill(campaign, directory, disk))
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)
        yield row


def _fill(campaign: Campaign, directory: Path, disk: Path) -> str | None:
    finished = campaign.fit(directory)
    if not finished.refused or not any(word in finished.last_line.lower() for word in ("space", "full")):
        return f"{finished.code}: {finished.last_line}"
    if partial := [path.name for path in disk.rglob("*") if "unfinished" in path.name]:
        return f"{partial[0]} is left"
    before = losses(directory)
    subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
    resumed = campaign.fit(directory, "--ckpt_path", "last")
    if resumed.refused and not list(disk.rglob("*.ckpt")):
        return None
    after = losses(directory)[len(before) :]
    same = resumed.code == 0 and after == losses(campaign.complete())[STEPS - len(after) :]
    return None if same else f"resumed: {resumed.code}: {resumed.last_line}"


def images(campaign: Campaign, tries: int) -> Iterator[Row]:
    """Damaged image files, in a folder and in tar shards."""
    folder = campaign.empty() / "images"
    folder.mkdir()
    names = []
    for index in range(tries):
        content, suffix = _damaged_image(campaign.random)
        names.append(f"{index:05}{suffix}")
        (folder / names[-1]).write_bytes(content)
    records = [{"file_name": name, "text": f"image {name}"} for name in names]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    row = Row("damaged images", "cut, flipped, zeroed or random bytes, in 6 formats", "read, or refused with the file's name")
    data = ImageFolder(directory=str(folder), height=32, width=32, batch_size=1, num_workers=0, validation_share=0.01)
    data.setup("fit")
    for dataset in data.splits().values():
        for index in range(len(dataset)):  # type: ignore[arg-type]
            row.add(*_read(dataset, index))
            yield row
    yield from _images_in_shards(folder, names)


def _images_in_shards(folder: Path, names: Sequence[str]) -> Iterator[Row]:
    """The same images in a tar shard, where those that cannot be read are left out and counted."""
    row = Row("damaged images in shards", "the same images in a tar shard", "read, or left out, counted and named")
    with tarfile.open(folder / "0.tar", "w") as shard:
        for name in names:
            shard.add(folder / name, name)
            caption = tarfile.TarInfo(f"{Path(name).stem}.txt")
            caption.size = len(name)
            shard.addfile(caption, io.BytesIO(name.encode()))
    source = str(folder / "0.tar")
    data = ImageText(source, source, height=32, width=32, num_workers=0)
    data.setup("fit")
    training = data.splits()["train"]
    assert isinstance(training, ImageTextDataset)
    dataset = training.without_replacement()
    left_out = sum(count for count, _ in dataset.source.skipped.entries.values())
    missing = len(names) - len(dataset) - left_out
    for _ in range(left_out):
        row.add(None, refused=True)
    for _ in range(missing):
        row.add("an image is neither a sample nor counted")
    for index in range(len(dataset)):
        row.add(*_read_sample(dataset, index))
        yield row


def _read_sample(dataset: ImageTextDataset, index: int) -> tuple[str | None, bool]:
    """Read one image of a shard; returns the failure, and whether the image was left out."""
    try:
        batch = dataset[index]
    except Exception as error:  # any exception would end a training
        return f"{type(error).__name__}: {error}", False
    if "image" in batch:
        return None if bool(torch.isfinite(batch["image"]).all()) else "values that are not finite", False
    return None if re.search(r"\d{5}", batch["broken"][0]) else f"without the file's name: {batch['broken'][0]}", True


def _read(dataset: Any, index: int) -> tuple[str | None, bool]:
    """Read one image; returns the failure, and whether the image was refused."""
    try:
        image = dataset.__getitems__([index])["image"]
    except ConfigurationError as error:
        return None if re.search(r"\d{5}\.\w+", str(error)) else f"without the file's name: {error}", True
    except Exception as error:  # any other exception would end a training
        return f"{type(error).__name__}: {error}", False
    return None if bool(torch.isfinite(image).all()) else "values that are not finite", False


def _damaged_image(generator: random.Random) -> tuple[bytes, str]:
    """Content and suffix of a damaged image."""
    suffix, kind = generator.choice(
        [(".png", "PNG"), (".jpg", "JPEG"), (".webp", "WEBP"), (".gif", "GIF"), (".tiff", "TIFF"), (".bmp", "BMP")]
    )
    pixels = np.frombuffer(generator.randbytes(48 * 40 * 3), np.uint8).reshape(48, 40, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    damage = generator.randrange(5)
    if damage == 0:
        return cut(bytes(content), generator), suffix
    start = generator.randrange(len(content))
    length = generator.randrange(1, min(200, len(content)))
    if damage == 1:
        for _ in range(generator.randrange(1, 20)):
            content = bytearray(flip_bit(bytes(content), generator))
    elif damage == 2:
        content[start : start + length] = bytes(len(content[start : start + length]))
    elif damage == 3:
        content[start : start + length] = generator.randbytes(len(content[start : start + length]))
    else:  # most of what decoders trust is in the header
        content[:64] = flip_bit(bytes(content[:64]), generator)
    return bytes(content), suffix


def two_processes(campaign: Campaign, tries: int) -> Iterator[Row]:
    """Kills, signals and bit flips of trainings with two processes, under each strategy."""
    for strategy in STRATEGIES:
        row = Row(f"{strategy}, kill -9", "SIGKILL at a random time, two processes", "resumed: the same losses, bit for bit")
        for _ in range(tries):
            row.add(campaign.interrupted(signal.SIGKILL, strategy))
            yield row
        row = Row(f"{strategy}, signals", "signals at a random time, two processes", "no step is lost; the same losses")
        for index in range(tries):
            row.add(campaign.interrupted(ENDING_SIGNALS[index % len(ENDING_SIGNALS)], strategy))
            yield row
        row = Row(
            f"{strategy}, bit flips", "one random bit of a checkpoint, two processes", "refused in one line, or the same losses"
        )
        for _ in range(tries):
            row.add(*_flip_and_resume(campaign, strategy))
            yield row


def _flip_and_resume(campaign: Campaign, strategy: str) -> tuple[str | None, bool]:
    directory = campaign.copy(strategy)
    states = [path for path in (directory / "run/checkpoints").iterdir() if not path.is_symlink() and path.suffix == ".ckpt"]
    state = min(states, key=lambda path: path.stat().st_mtime)
    file = pick([path for path in state.rglob("*") if path.is_file()], campaign.random) if state.is_dir() else state
    file.write_bytes(flip_bit(file.read_bytes(), campaign.random))
    finished = campaign.fit(directory, "--ckpt_path", str(state), strategy=strategy)
    trained = losses(directory)
    same = finished.code == 0 and trained == losses(campaign.complete(strategy))[STEPS - len(trained) :]
    shutil.rmtree(directory)
    return None if finished.refused or same else f"{file.name}: {finished.code}: {finished.last_line}", finished.refused


KINDS: dict[str, tuple[Callable[[Campaign, int], Iterator[Row]], int]] = {
    "kills": (kills, 30),
    "signals": (signals, 12),
    "checkpoints": (checkpoints, 60),
    "exports": (exports, 60),
    "latents": (latents, 30),
    "full_disk": (full_disk, 10),
    "images": (images, 2000),
    "two_processes": (two_processes, 5),
}
"""Function and default number of tries of each kind."""


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of rows."""
    lines = ["| kind | fault | what has to happen | tried | passed | of them refused |", "|---|---|---|---|---|---|"]
    names = ("kind", "fault", "expected", "tried", "passed", "refused")
    lines += [f"| {' | '.join(str(row[name]) for name in names)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the kinds, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--tries", type=int, help="tries of each kind (default: per kind)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random points")
    parser.add_argument("--machine", default=f"{platform.machine()}-{os.cpu_count()}-cores", help="machine name in the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    preload()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"faults_{arguments.machine}.json"
    rows = {row["kind"]: row for row in (json.loads(path.read_text())["rows"] if path.is_file() else [])}
    with tempfile.TemporaryDirectory() as place:
        for kind in arguments.kinds:
            function, tries = KINDS[kind]
            campaign = Campaign(Path(place), random.Random(f"{arguments.seed} {kind}"))
            done: dict[str, Row] = {}
            for row in function(campaign, arguments.tries or tries):
                done[row.kind] = row
            for row in done.values():
                rows[row.kind] = asdict(row)
                print(f"{row.kind}: {row.passed} of {row.tried} passed", *row.failures, sep="\n  ", flush=True)
            date = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
            content = {"machine": arguments.machine, "date": date, "torch": torch.__version__, "rows": list(rows.values())}
            path.write_text(json.dumps(content, indent=2) + "\n")
            path.with_suffix(".md").write_text(table(list(rows.values())))


if __name__ == "__main__":
    main()
