"""Comparison of all methods on the embedded teacher with equal data, training time and metrics.

`python benchmarks/compare_methods.py` trains each method from its shipped config through the command line, with several seeds
and as many steps as take `--minutes`. After each run it rewrites `benchmarks/results/compare_methods.json`, a table and plots.
A run uses one core and the batch size of its config's two processes together. `--workers` runs execute in parallel, which is
faster than one run on all cores.

The time of a step is measured first, for all methods, in a short version of each run. It includes all phases, because later
steps of some methods take longer. These times are those of one machine without other load. Times and runs are recorded in
`benchmarks/results/compare_methods/`. Recorded runs are not repeated, so runs can be added later and on other machines.
"""

import argparse
import datetime
import json
import math
import os
import platform
import random
import statistics
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import matplotlib
import torch
from diffusers import AutoencoderKL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import events, full_config, run_config, scale_steps, single_process, train

from lightning_distill.commands.pipelines import load_pipeline
from lightning_distill.data.shapes import CATEGORIES, render, sample_scene
from lightning_distill.data.shapes_datamodule import evaluation_prompts
from lightning_distill.metrics import AutoencoderFeatures, FrechetDistance
from lightning_distill.teachers import resolve_pretrained

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
RECORDS = RESULTS / "compare_methods"
COSTS = RECORDS / "costs.json"
METHODS = {
    "meanflow": "shapes_meanflow.yaml",
    "split_meanflow": "shapes_split_meanflow.yaml",
    "scm": "shapes_scm.yaml",
    "consistency_distillation": "shapes_consistency_distillation.yaml",
    "imm": "shapes_imm.yaml",
    "pi_flow": "shapes_pi_flow.yaml",
    "dmd2": "shapes_dmd2.yaml",
    "tdm": "shapes_tdm.yaml",
    "ladd": "shapes_ladd.yaml",
    "knowledge_distillation": "shapes_knowledge_distillation.yaml",
}
STEPS = ("1", "2", "4", "8")
SHORT_RUN = 0.06
"""Steps of the run that measures the time of a step, as a share of the full run."""
FRECHET_IMAGES = 2560
BATCH = 64
SHARE_OF_TEACHER = 0.9


def seconds_per_step(config: dict[str, Any], directory: Path) -> float:
    """Mean time of an optimizer step in a short version of the run, without validations."""
    settings = single_process(
        run_config(scale_steps(config, SHORT_RUN), 0, directory, keep=lambda name: name == "SwitchSolution")
    )
    trainer = settings["trainer"]
    trainer |= {"log_every_n_steps": 1, "limit_val_batches": 0}
    for callback in trainer["callbacks"]:  # without validations, the switch comes at its latest step
        callback["init_args"] |= {
            "threshold": None,
            "earliest_step": callback["init_args"]["latest_step"],
            "guard_factor": None,
        }
    train(settings, directory, threads=1)
    rates = [event.value for event in events(directory).Scalars("perf/samples_per_second")]
    batch = settings["data"]["init_args"]["batch_size"]
    return statistics.mean(batch / rate for rate in rates[1:])  # the first value is slow


def costs(configs: Mapping[str, dict[str, Any]], machine: str, directory: Path, pool: Executor) -> dict[str, float]:
    """Seconds per step of each method: recorded, or measured in parallel, as the runs are executed.

    Raises:
        SystemExit: If the record lacks a method.
    """
    if not COSTS.is_file():
        seconds = pool.map(lambda name: seconds_per_step(configs[name], directory / name), configs)
        found = {name: round(each, 4) for name, each in zip(configs, seconds, strict=True)}
        date = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
        RECORDS.mkdir(parents=True, exist_ok=True)
        COSTS.write_text(json.dumps({"date": date, "machine": machine, "seconds_per_step": found}, indent=1) + "\n")
    recorded: dict[str, float] = json.loads(COSTS.read_text())["seconds_per_step"]
    if missing := sorted(configs.keys() - recorded.keys()):
        raise SystemExit(f"{COSTS} has no cost of {', '.join(missing)}; remove the file to measure all costs again")
    return recorded


def measure(name: str, config: dict[str, Any], seed: int, steps: int, machine: str, directory: Path) -> dict[str, Any]:
    """Train a method for some steps, unless the run is recorded, and return the record.

    Raises:
        SystemExit: If the recorded run had another number of steps.
    """
    record = RECORDS / f"{name}-{seed}.json"
    if not record.is_file():
        factor = steps / config["trainer"]["max_steps"]
        unwanted = ("AtomicCheckpoint", "LogImages", "DistillProgressBar")
        settings = scale_steps(config, factor)
        settings = single_process(run_config(settings, seed, directory, keep=lambda callback: callback not in unwanted))
        settings["model"]["init_args"]["validation"] |= {"nfe": [int(n) for n in STEPS]}
        train(settings, directory, threads=1)
        summary = json.loads((directory / "summary.json").read_text())
        curves = events(directory)
        found = {
            "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
            "machine": machine,
            "summary": summary,
            "steps": settings["trainer"]["max_steps"],
            "frechet": frechet(directory / "student"),
            "curve": accuracy_over_run(curves),
        }
        RECORDS.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(found, indent=1) + "\n")
    recorded: dict[str, Any] = json.loads(record.read_text())
    if recorded["steps"] != steps:
        raise SystemExit(
            f"{record} has {recorded['steps']} steps, and --minutes gives {steps}; set --minutes to the record's, or remove it"
        )
    return recorded


def accuracy_over_run(curves: EventAccumulator) -> dict[str, list[tuple[float, float]]]:
    """Curves of (share of the training time, accuracy) by number of student steps.

    Time runs from the first logged step to the last validation.
    """
    start = curves.Scalars("perf/samples_per_second")[0].wall_time
    duration = max(curves.Scalars(f"val/prompt_accuracy/nfe_{n}")[-1].wall_time for n in STEPS) - start
    return {
        n: [
            (round((event.wall_time - start) / duration, 4), round(event.value, 4))
            for event in curves.Scalars(f"val/prompt_accuracy/nfe_{n}")
        ]
        for n in STEPS
    }


@torch.no_grad()
def frechet(pipeline: str | Path, count: int = FRECHET_IMAGES) -> dict[str, float]:
    """Fréchet distance between images of an exported student and renderings of the same captions, by number of steps.

    Args:
        pipeline: Directory of the export.
        count: Number of images of each kind; only distances of equal counts are comparable.
    """
    student = load_pipeline(str(pipeline), trust_remote_code=True)
    student.set_progress_bar_config(disable=True)
    autoencoder = AutoencoderKL.from_pretrained(Path(resolve_pretrained("shapes-teacher")) / "vae")
    metric = FrechetDistance(AutoencoderFeatures(autoencoder), reset_real_features=False)
    prompts = list(evaluation_prompts(math.ceil(count / len(CATEGORIES)), held_out=False))[:count]
    scenes = [sample_scene(prompt, random.Random(f"frechet/{i}")) for i, prompt in enumerate(prompts)]
    for start in range(0, count, BATCH):
        metric.update(render(scenes[start : start + BATCH]).float() / 255, real=True)
    found = {}
    for n in STEPS:
        for start in range(0, count, BATCH):
            texts = [prompt.text for prompt in prompts[start : start + BATCH]]
            generators = [torch.Generator().manual_seed(3_000_000 + start + i) for i in range(len(texts))]
            size = {"height": 32, "width": 32, "output_type": "pt"}
            metric.update(student(texts, num_inference_steps=int(n), generator=generators, **size).images, real=False)
        found[n] = float(metric.compute())
        metric.reset()
    return found


def share_to(curve: list[tuple[float, float]], accuracy: float) -> float | None:
    """Share of the run at which a curve of (share, accuracy) first reaches an accuracy, or None."""
    return next((share for share, value in curve if value >= accuracy), None)


def merge(records: list[dict[str, Any]], teacher: float, cost: float, minutes: float) -> dict[str, dict[str, Any]]:
    """Metrics of a method over its seeds, by number of steps; the standard deviation of one seed is 0.

    Args:
        records: Records of the seeds.
        teacher: Accuracy of the teacher at its full number of steps.
        cost: Seconds per training step.
        minutes: Training time of a run.
    """
    merged = {}
    for n in STEPS:
        accuracy = [record["summary"]["student"][n] for record in records]
        reached = [share_to(record["curve"][n], SHARE_OF_TEACHER * teacher) for record in records]
        merged[n] = {
            "mean": statistics.mean(accuracy),
            "std": statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0,
            "diversity": statistics.mean(record["summary"]["diversity"]["student"][n] for record in records),
            "frechet": statistics.mean(record["frechet"][n] for record in records),
            "categories": {
                category: statistics.mean(record["summary"]["categories"]["student"][n][category] for record in records)
                for category in CATEGORIES
            },
            "seconds_per_step": cost,
            "minutes_to_teacher": None if None in reached else minutes * statistics.mean(x for x in reached if x is not None),
        }
    return merged


def table(result: Mapping[str, Any]) -> str:
    """Markdown table with a row per method and number of steps; accuracy in percent."""
    head = ["method", "steps", *CATEGORIES, "overall", "diversity", "Frechet", "s a step", "min. to 0.9 of teacher"]
    rows = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for name in METHODS:
        for n, figures in result.get(name, {}).items():
            categories = [f"{100 * figures['categories'][category]:.1f}" for category in CATEGORIES]
            overall = f"{100 * figures['mean']:.1f} ± {100 * figures['std']:.1f}"
            reached = figures["minutes_to_teacher"]
            rest = [f"{figures['diversity']:.3f}", f"{figures['frechet']:.2f}", f"{figures['seconds_per_step']:.3f}"]
            cells = [name, n, *categories, overall, *rest, "" if reached is None else f"{reached:.1f}"]
            rows.append(f"| {' | '.join(cells)} |")
    teacher = result["run"]["teacher"]
    return "\n".join([*rows, "", "Teacher: " + ", ".join(f"{100 * value:.1f} at {n}" for n, value in teacher.items()) + "."])


def plot_steps(result: Mapping[str, Any], path: Path) -> None:
    """Plot accuracy against the number of steps, with a line per method."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    x = [int(n) for n in STEPS]
    for name in METHODS:
        if name in result:
            values, deviation = ([result[name][n][key] for n in STEPS] for key in ("mean", "std"))
            axes.errorbar(x, values, deviation, marker="o", capsize=3, label=name.replace("_", " "))
    teacher = result["run"]["teacher"]
    axes.plot(x, [teacher[n] for n in STEPS], "k--", marker="s", label="teacher")
    axes.axhline(max(teacher.values()), color="k", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="steps", ylabel="prompt accuracy", ylim=(0, 1), xticks=x, xticklabels=STEPS)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_minutes(records: Mapping[str, list[dict[str, Any]]], minutes: float, path: Path) -> None:
    """Plot validation accuracy at one, two and four steps over training time, for the first seed of each method."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    for axes, n in zip(panels, ("1", "2", "4"), strict=True):
        for name, found in records.items():
            shares, accuracy = zip(*found[0]["curve"][n], strict=True)
            axes.plot([minutes * share for share in shares], accuracy, marker=".", label=name.replace("_", " "))
        axes.set(xlabel="minutes", title=f"{n} step{'' if n == '1' else 's'}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("prompt accuracy")
    panels[2].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(minutes: float) -> None:
    """Write the results of all recorded runs."""
    cost = json.loads(COSTS.read_text())
    records: dict[str, list[dict[str, Any]]] = {}
    for name in METHODS:
        paths = sorted(RECORDS.glob(f"{name}-*.json"), key=lambda path: int(path.stem.rpartition("-")[2]))
        if paths:
            records[name] = [json.loads(path.read_text()) for path in paths]
    first = next(iter(records.values()))[0]["summary"]
    teacher = first["teacher"]
    result: dict[str, Any] = {
        "run": {
            "date": max(record["date"] for found in records.values() for record in found),
            "machine": cost["machine"],
            "run_on": sorted({record["machine"] for found in records.values() for record in found}),
            "minutes": minutes,
            "seeds": {name: len(found) for name, found in records.items()},
            "teacher": teacher,
            "teacher_diversity": max(first["diversity"]["teacher"].values()),
        },
        **{
            name: merge(found, max(teacher.values()), cost["seconds_per_step"][name], minutes)
            for name, found in records.items()
        },
    }
    (RESULTS / "compare_methods.json").write_text(json.dumps(result, indent=2) + "\n")
    run = result["run"]
    heading = (
        f"{run['date']}; {minutes:g} minutes a run on one core, at the costs of a step on {run['machine']}, run on "
        f"{', '.join(run['run_on'])}; seeds {run['seeds']}"
    )
    (RESULTS / "compare_methods.md").write_text(f"{heading}\n\n{table(result)}\n")
    plot_steps(result, RESULTS / "compare_methods.png")
    plot_minutes(records, minutes, RESULTS / "compare_methods_minutes.png")


def main() -> None:
    """Execute the missing runs, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="training time per run, at the recorded costs")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds per method")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="methods to run")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="number of parallel runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare_methods"), help="output directory of the runs")
    parser.add_argument(
        "--machine", default=f"{platform.machine()}, {os.cpu_count()} cores", help="machine name in the results"
    )
    arguments = parser.parse_args()
    configs = {name: full_config(config) for name, config in METHODS.items()}
    torch.set_num_threads(1)
    with ThreadPoolExecutor(arguments.workers) as pool:
        seconds = costs(configs, arguments.machine, arguments.runs / "costs", pool)

        def run(seed: int, name: str) -> tuple[int, str, dict[str, Any]]:
            steps = round(60 * arguments.minutes / seconds[name])
            found = measure(name, configs[name], seed, steps, arguments.machine, arguments.runs / name / str(seed))
            return seed, name, found["summary"]["student"]

        # The outer loop is over seeds, so that an interrupted comparison has all methods.
        runs = [pool.submit(run, seed, name) for seed in range(arguments.seeds) for name in arguments.methods]
        for done in as_completed(runs):
            print(*done.result(), flush=True)
            write(arguments.minutes)


if __name__ == "__main__":
    main()
