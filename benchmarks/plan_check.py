"""Accuracy of `plan`: its estimates against measured peaks of real training steps of small FLUX networks.

`python benchmarks/plan_check.py` trains a few steps of each case in subprocesses on the CPU. It writes
`benchmarks/results/plan_check_<machine>.json` and a table. `--cases` selects cases.

The measured value is the peak memory of a process in the last step, as Linux reports it. Its memory before it loaded a network
is subtracted. The value includes teacher, student, gradients, optimizer, activations and the gathered weights of strategies.
"""

import argparse
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

import lightning_distill.sharding.strategies  # noqa: F401  # registers the names of the strategies
from lightning_distill.methods import MeanFlow
from lightning_distill.methods.guidance import Guidance
from lightning_distill.methods.validation import ValidationOptions
from lightning_distill.planning.machine import STRATEGIES, plan_for
from lightning_distill.planning.step import BatchShape, measure_step
from lightning_distill.teachers import DiffusersAdapter
from lightning_distill.teachers.embedded import build_flux_pipeline
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions

RESULTS = Path(__file__).resolve().parent / "results"
BOUND = 0.15
"""Maximum accepted relative error."""
SIZE = 64
"""Height and width of an image in pixels; an image token covers 4 x 4 pixels."""


@dataclass(frozen=True)
class Case:
    """A training run.

    ZeRO-3 prefetches weights only after a complete step, so its cases need more steps.
    """

    name: str
    strategy: str = "auto"
    processes: int = 1
    solution: str = "discrete"
    checkpointing: bool = False
    rank: int = 0
    layers: int = 2
    heads: int = 8
    samples: int = 8
    precision: str = "32-true"
    steps: int = 2


CASES = {
    case.name: case
    for case in (
        Case("discrete"),
        Case("discrete, checkpointed", checkpointing=True),
        Case("differential", solution="differential"),
        Case("differential, checkpointed", solution="differential", checkpointing=True),
        Case("LoRA, differential", solution="differential", rank=16),
        Case("ddp, discrete", "ddp"),
        Case("ddp, two processes", "ddp", 2),
        Case("fsdp2, two processes", "fsdp2", 2, checkpointing=True, layers=8, samples=4),
        Case("deepspeed_stage_3, two processes", "deepspeed_stage_3", 2, checkpointing=True, layers=8, samples=4, steps=4),
        Case("bf16-mixed, discrete", precision="bf16-mixed"),
        Case("bf16-mixed, differential, checkpointed", solution="differential", checkpointing=True, precision="bf16-mixed"),
        Case("bf16-mixed, fsdp2, two processes", "fsdp2", 2, checkpointing=True, layers=8, samples=4, precision="bf16-mixed"),
    )
}


def save_pipeline(case: Case, directory: Path) -> None:
    """Save the teacher of a case, with random weights."""
    from tests.tiny import WORDS, tiny_vae

    torch.manual_seed(0)
    pipeline = build_flux_pipeline(
        tiny_vae(), WORDS, num_layers=case.layers, num_single_layers=case.layers, num_attention_heads=case.heads, text_width=16
    )
    pipeline.save_pretrained(directory)


def method(case: Case, directory: Path) -> MeanFlow:
    """The method of a case."""
    return MeanFlow(
        DiffusersAdapter(str(directory)),
        guidance=Guidance("two_branch", 2.0),
        solution=case.solution,  # type: ignore[arg-type]
        solver_steps=1,
        equal_fraction=0.0,
        student=StudentOptions(
            gradient_checkpointing=case.checkpointing, max_drift=10.0, lora=LoraOptions(case.rank) if case.rank else None
        ),
        validation=ValidationOptions(nfe=(1,), average_velocity=False, height=SIZE, width=SIZE),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-4),
    )


def predicted(case: Case, directory: Path) -> float:
    """Estimated peak memory of a process in MiB."""
    module = method(case, directory)
    module.adapter.check()
    cost = measure_step(module, directory, BatchShape(case.samples, (SIZE, SIZE)), [case.solution], case.precision, gpu=False)
    return plan_for(cost, STRATEGIES[case.strategy], case.processes).peak / 2**20


class Peak(Callback):
    """Records the peak memory of the process in the last step, because libraries initialize in the first."""

    def __init__(self) -> None:
        self.peak = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the peak of the step, and reset it."""
        self.peak = in_use("VmHWM")
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak on Linux


def in_use(field: str) -> float:
    """Memory of this process in MiB: `VmRSS` is the current value, `VmHWM` the peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 2**10


def train(case: Case, directory: Path) -> float:
    """Peak memory of a process in MiB, above its memory after training a tiny network, which initializes libraries."""
    base = 0.0
    for small in (True, False):
        seed_everything(0)
        samples = 1 if small else case.samples
        module = method(case, directory / "small" if small else directory / "large")
        image = torch.zeros(3, SIZE, SIZE)
        data = [{"image": image, "prompt": "a red circle", "index": i} for i in range(case.steps * samples)]
        peak = Peak()
        trainer = Trainer(
            max_steps=case.steps,
            precision=case.precision,  # type: ignore[arg-type]
            accelerator="cpu",
            devices=case.processes,
            strategy=case.strategy,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            callbacks=[peak],
        )
        trainer.fit(module, DataLoader(data, batch_size=samples))
        if small:
            del module, trainer
            gc.collect()
            base = in_use("VmRSS")
    return peak.peak - base


def measured(case: Case, directory: Path) -> float:
    """Measured peak memory of a process in MiB, from a subprocess."""
    save_pipeline(case, directory / "large")
    save_pipeline(Case("small", heads=2, layers=1), directory / "small")
    # Freed memory returns to the system at once, so that the peak is that of live memory.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    root = str(RESULTS.parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    out = directory / "peak.json"
    command = [sys.executable, str(Path(__file__).resolve()), "--train", case.name, str(directory), str(out)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    peak: float = json.loads(out.read_text())
    return peak


def check(case: Case) -> dict[str, Any]:
    """Row of the results for a case."""
    with tempfile.TemporaryDirectory() as folder:
        actual = measured(case, Path(folder))
        estimate = predicted(case, Path(folder) / "large")
    ratio = round(estimate / actual, 3)
    return {**asdict(case), "measured_mib": round(actual, 1), "predicted_mib": round(estimate, 1), "ratio": ratio}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of the rows."""
    lines = ["| case | measured MiB | predicted MiB | predicted / measured | within 15 % |", "|---|---:|---:|---:|---|"]
    for row in rows:
        within = "yes" if abs(row["ratio"] - 1) <= BOUND else "no"
        numbers = f"{row['measured_mib']:.0f} | {row['predicted_mib']:.0f} | {row['ratio']:.2f}"
        lines.append(f"| {row['name']} | {numbers} | {within} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the cases, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--machine", default=f"{platform.machine()}-{os.cpu_count()}-cores", help="machine name in the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument("--train", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        name, directory, out = arguments.train
        peak = train(CASES[name], Path(directory))
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            Path(out).write_text(json.dumps(peak))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"plan_check_{arguments.machine}.json"
    rows = {row["name"]: row for row in (json.loads(path.read_text())["rows"] if path.is_file() else [])}
    for name in arguments.cases:
        rows[name] = check(CASES[name])
        print(table([rows[name]]).splitlines()[-1], flush=True)
        ordered = [rows[case] for case in CASES if case in rows]
        date = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
        content = {"machine": arguments.machine, "date": date, "torch": torch.__version__, "rows": ordered}
        path.write_text(json.dumps(content, indent=2) + "\n")
        path.with_suffix(".md").write_text(table(ordered))


if __name__ == "__main__":
    main()
