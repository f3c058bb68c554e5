"""Study of the parts of the MeanFlow recipe: five variants with the demo's budget and several seeds, and the long runs.

`python benchmarks/meanflow_study.py` trains every variant through the command line, from the demo's config with a few changed
settings. It records the metrics and curves of each run in `benchmarks/results/meanflow_study/`. After each run it rewrites
`meanflow_study.json`, a table and plots beside that folder. Recorded runs are not repeated, so an interrupted study can
continue; remove the records after a change to the recipe. "Discrete" is always the bootstrapped discrete solution of the demo.
"""

import argparse
import copy
import datetime
import json
import os
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import full_config, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
RECORDS = RESULTS / "meanflow_study"
CURVES = {"val/prompt_accuracy/nfe_1": "prompt accuracy, 1 step", "val/average_velocity_error": "average velocity error"}
NEVER = 10**9
STEPS = ("1", "2", "4", "8")
VARIANTS: dict[str, dict[str, Any]] = {
    "differential_original_time": {"switch_at": 0, "time_embedding": "original", "aligned": False, "steps": 1.6},
    "differential": {"switch_at": 0, "time_embedding": "smooth", "aligned": False, "steps": 1.6},
    "discrete": {"switch_at": NEVER, "time_embedding": "smooth", "aligned": False, "steps": 1.8},
    "switched": {"switch_at": None, "time_embedding": "smooth", "aligned": False, "steps": 1.8},
    "switched_aligned": {"switch_at": None, "time_embedding": "smooth", "aligned": True, "steps": 1.0},
}
"""Settings of each variant: step of the switch (None is the demo's rule), time embedding, alignment, and number of steps.

Numbers of steps are multiples of the demo's. Steps without alignment take less time, and all variants have equal training time.
"""
LONG = {
    "full": "shapes_meanflow_full.yaml",
    "second_stage": "shapes_dmd2_second_stage.yaml",
    "one_step": "shapes_dmd2_one_step.yaml",
}
"""Configs of the long runs by the names of their records. Each continues from the export of the previous run."""
FROM_THE_START = {"lr": 2.5e-4, "p": 1.0}
"""Settings for the differential solution from the start. With the demo's learning rate of 2e-3 and p of 0.5, runs with the
refitted time embedder collapsed. At 5e-4 they collapsed after some 800 steps. The original embedder, which learns more slowly,
was stable there."""


def variant_config(demo: dict[str, Any], variant: str, seed: int, directory: Path) -> dict[str, Any]:
    """Settings of a variant of the demo."""
    settings, choice = copy.deepcopy(demo), VARIANTS[variant]
    settings["seed_everything"] = seed
    settings["data"]["init_args"]["seed"] = seed
    model, trainer = settings["model"]["init_args"], settings["trainer"]
    model["student"]["time_embedding"] = choice["time_embedding"]
    share = choice["steps"]
    if not choice["aligned"]:
        model["alignment"] = None
    if choice["switch_at"] == 0:
        model["optimizer"]["init_args"]["lr"] = FROM_THE_START["lr"]
        model["loss"]["init_args"]["p"] = FROM_THE_START["p"]
    steps = trainer["max_steps"] = round(share * trainer["max_steps"])
    model["lr_scheduler"]["init_args"]["total_steps"] = steps
    trainer["default_root_dir"] = str(directory)
    callbacks = []
    for callback in trainer["callbacks"]:
        name = callback["class_path"].rsplit(".", 1)[-1]
        if name in ("ExportPipeline", "AtomicCheckpoint", "LogImages", "DistillProgressBar"):
            continue  # not needed by the study
        if name == "SwitchSolution" and choice["switch_at"] is not None:
            # Without rollback, so that a collapse is visible.
            at = choice["switch_at"]
            callback["init_args"] |= {"threshold": None, "earliest_step": at, "latest_step": at, "guard_factor": None}
        elif name == "SwitchSolution":
            for key in ("earliest_step", "latest_step"):
                callback["init_args"][key] = round(share * callback["init_args"][key])
        callbacks.append(callback)
    trainer |= {"callbacks": callbacks, "enable_checkpointing": False, "enable_progress_bar": False}
    return settings


def run(settings: dict[str, Any], name: str, directory: Path) -> dict[str, Any]:
    """Train, unless the run is recorded, and return its summary."""
    record = RECORDS / f"{name}.json"
    if not record.is_file():
        train(settings, directory)
        summary = json.loads((directory / "summary.json").read_text())
        found = {"summary": summary, "curves": read_curves(directory)}
        RECORDS.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(found, indent=1) + "\n")
    recorded: dict[str, Any] = json.loads(record.read_text())
    return recorded["summary"]


def read_curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of the curves of a run."""
    events = EventAccumulator(str(directory)).Reload()
    logged = [tag for tag in CURVES if tag in events.Tags()["scalars"]]  # the second stage logs no velocity error
    return {tag: [(event.step, round(event.value, 5)) for event in events.Scalars(tag)] for tag in logged}


def merge(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of the student's metrics over seeds, and the standard deviation of accuracy, which is 0 for one seed."""
    accuracy = {n: [summary["student"][n] for summary in summaries] for n in STEPS}
    diversity = {n: [summary["diversity"]["student"][n] for summary in summaries] for n in STEPS}
    return {
        "accuracy": {n: statistics.mean(values) for n, values in accuracy.items()},
        "std": {n: statistics.stdev(values) if len(values) > 1 else 0.0 for n, values in accuracy.items()},
        "diversity": {n: statistics.mean(values) for n, values in diversity.items()},
        "minutes": statistics.mean(summary["minutes"] for summary in summaries),
    }


def _with_long_runs(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    long = {
        "full recipe": result["full"],
        "its second stage, by DMD2": result["second_stage"],
        "a third, for one step": result["one_step"],
    }
    return {**result["variants"], **{name: figures for name, figures in long.items() if figures}}


def table(result: dict[str, Any]) -> str:
    """Markdown table: accuracy in percent, with the standard deviation over seeds."""
    rows = [
        "| variant | 1 step | 2 steps | 4 steps | 8 steps | diversity at 1 | minutes |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, figures in _with_long_runs(result).items():
        several = len(result["each_seed"].get(name, ())) > 1  # one run has no deviation
        cells = [
            f"{100 * figures['accuracy'][n]:.1f}" + (f" ± {100 * figures['std'][n]:.1f}" if several else "") for n in STEPS
        ]
        rows.append(f"| {name} | {' | '.join(cells)} | {figures['diversity']['1']:.3f} | {figures['minutes']:.1f} |")
    teacher = result["teacher"]
    cells = [f"{100 * teacher[n]:.1f}" for n in STEPS]
    rows.append(
        f"| teacher (32 steps: {100 * teacher['32']:.1f}) | {' | '.join(cells)} | {result['teacher_diversity']:.3f} | |"
    )
    return "\n".join(rows) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot accuracy against the number of steps, with a line per variant."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    x = [int(n) for n in STEPS]
    for name, figures in _with_long_runs(result).items():
        values, deviation = ([figures[key][n] for n in STEPS] for key in ("accuracy", "std"))
        axes.errorbar(x, values, deviation, marker="o", capsize=3, label=name.replace("_", " "))
    axes.plot(x, [result["teacher"][n] for n in STEPS], "k--", marker="s", label="teacher")
    axes.axhline(result["teacher"]["32"], color="k", linewidth=0.8, linestyle=":", label="teacher, 32 steps")
    axes.set(xscale="log", xlabel="steps", ylabel="prompt accuracy", ylim=(0, 1), xticks=x, xticklabels=STEPS)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_curves(variants: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot validation accuracy at one step and the average velocity error over training, averaged over the seeds."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, (tag, label) in zip(panels, CURVES.items(), strict=True):
        for variant, records in variants.items():
            found: dict[int, list[float]] = {}
            for record in records:
                for step, value in record["curves"][tag]:
                    found.setdefault(step, []).append(value)
            axes.plot(
                list(found), [statistics.mean(values) for values in found.values()], marker=".", label=variant.replace("_", " ")
            )
        axes.set(xlabel="optimizer steps", ylabel=label)
        axes.grid(alpha=0.3)
    panels[1].set_yscale("log")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Execute the missing runs, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds per variant")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="variants to run")
    parser.add_argument("--runs", type=Path, default=Path("runs/meanflow_study"), help="output directory of the runs")
    parser.add_argument("--first-seed", type=int, default=0, help="first seed")
    parser.add_argument(
        "--machine", default=f"{platform.machine()}, {os.cpu_count()} cores", help="machine name in the results"
    )
    parser.add_argument("--no-full", action="store_true", help="skip the full recipe and its later stages")
    arguments = parser.parse_args()
    demo, runs = full_config("shapes_meanflow.yaml"), arguments.runs
    seeds = list(range(arguments.first_seed, arguments.first_seed + arguments.seeds))
    for seed in seeds:  # the outer loop, so that an interrupted study compares all variants
        for variant in arguments.variants:
            directory = runs / variant / str(seed)
            settings = variant_config(demo, variant, seed, directory)
            print(variant, seed, run(settings, f"{variant}-{seed}", directory)["student"], flush=True)
            write(arguments.machine)
    if not arguments.no_full:
        for name, config in LONG.items():
            settings = full_config(config)
            print(name, run(settings, name, Path(settings["trainer"]["default_root_dir"]))["student"], flush=True)
            write(arguments.machine)


def _long_run(record: Path) -> dict[str, Any]:
    return merge([json.loads(record.read_text())["summary"]]) if record.is_file() else {}


def write(machine: str) -> None:
    """Write the results of all recorded runs."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for variant in VARIANTS:
        for path in sorted(RECORDS.glob(f"{variant}-*.json")):
            found.setdefault(variant, {})[int(path.stem.rpartition("-")[2])] = json.loads(path.read_text())
    summaries = {variant: {seed: one["summary"] for seed, one in records.items()} for variant, records in found.items()}
    first = next(iter(next(iter(summaries.values())).values()))
    result = {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "machine": machine,
        "seeds": sorted({seed for records in found.values() for seed in records}),
        "teacher": first["teacher"],
        "teacher_diversity": first["diversity"]["teacher"]["32"],
        "variants": {variant: merge(list(each.values())) for variant, each in summaries.items()},
        **{name: _long_run(RECORDS / f"{name}.json") for name in LONG},
        "each_seed": {v: {seed: summary["student"] for seed, summary in each.items()} for v, each in summaries.items()},
    }
    (RESULTS / "meanflow_study.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "meanflow_study.md").write_text(f"{result['date']}, {machine}; seeds {result['seeds']}\n\n{table(result)}")
    plot(result, RESULTS / "meanflow_study.png")
    plot_curves({variant: list(records.values()) for variant, records in found.items()}, RESULTS / "meanflow_study_curves.png")


if __name__ == "__main__":
    main()
