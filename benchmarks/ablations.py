"""Ablations of single MeanFlow settings on the embedded teacher: each variant differs from one short recipe in one setting.

`python benchmarks/ablations.py` trains every variant through the command line, with equal numbers of optimizer steps and one or
more seeds. After each run it rewrites `benchmarks/results/ablations.json` and a table.

The recipe is the demo without alignment. `SwitchSolution` switches at a fixed step without rollback, so that a collapse is
visible. Time embedders are compared where they matter: with the differential solution from the start. The rescaled embedder is
trained first, by `TimestepRescaling`, for the same number of steps.

A run uses one core and the batch size of the demo's two processes together. `--workers` runs execute in parallel. Recorded runs
in `benchmarks/results/ablations/` are not repeated; remove the records after a change to the recipe.
"""

import argparse
import copy
import datetime
import json
import math
import os
import platform
import statistics
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from training_runs import events, full_config, run_config, scale_steps, single_process, train

RESULTS = Path(__file__).resolve().parent / "results"
RECORDS = RESULTS / "ablations"
STEPS = ("1", "2", "4", "8")
SWITCH_AT = 0.7
"""Step of the switch to the differential solution, as a share of the run."""
RESCALED = "rescaled"

GAMMA = "lightning_distill.flow.losses.PowerLoss"
FROM_THE_START = {"switch": 1.0, "solution": "differential", "optimizer.init_args.lr": 2.5e-4, "loss.init_args.p": 1.0}
"""Settings for the differential solution from the start: at higher rates, runs with the smooth embedder collapse."""
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "recipe": {"as it is": {}},
    "loss": {
        "gamma 1": {"loss": {"class_path": GAMMA, "init_args": {"gamma": 1.0}}},
        "gamma 2": {"loss": {"class_path": GAMMA, "init_args": {"gamma": 2.0}}},
        "adaptive, p 1": {"loss.init_args.p": 1.0},
    },
    "guidance": {
        f"improved, kappa {kappa}": {
            "guidance": {"kind": "improved", "omega": 2.0 * (1 - kappa), "kappa": kappa},
            "caption_dropout": 0.1,
        }
        for kappa in (0.0, 0.5, 0.9)
    },
    "training states": {
        "noised images": {"trajectory_fraction": 0.0},
        "student trajectories": {"trajectory_fraction": 1.0},
        "half teacher trajectories": {"trajectory_source": "teacher"},
    },
    "interval input": {"a clone": {"student.interval_embedding": "clone"}},
    "discrete sub-steps": {
        f"the teacher in {count}": {"solution": "discrete", "solver_steps": count, "solver": "heun"} for count in (1, 2, 4, 8)
    },
    "switch": {f"at a share of {share}": {"switch": share} for share in (0.3, 0.5, 0.9, 1.0)},
    "time embedder, differential from the start": {
        "original": {**FROM_THE_START, "student.time_embedding": "original"},
        **{
            f"smooth, up to {factor} pi": {**FROM_THE_START, "student.frequency_bound": round(factor * math.pi, 4)}
            for factor in (1, 2, 4, 16)
        },
        RESCALED: {**FROM_THE_START, "student.time_embedding": "rescaled"},
    },
}
"""Variants by group: model settings by dotted path, and `switch`, the step of the switch as a share of the run."""


def assign(settings: dict[str, Any], path: str, value: Any) -> None:
    """Set the setting at a dotted path.

    Raises:
        KeyError: If there is no such setting.
    """
    *parents, name = path.split(".")
    for parent in parents:
        settings = settings[parent]
    if name not in settings:
        raise KeyError(f"there is no setting {path!r}")
    settings[name] = copy.deepcopy(value)


def variant_config(
    demo: dict[str, Any], changes: Mapping[str, Any], steps: int, seed: int, directory: Path, pretrained: str | None = None
) -> dict[str, Any]:
    """Settings of a variant of the recipe.

    Args:
        demo: All settings of the demo.
        changes: Changed settings, from `GROUPS`.
        steps: Number of optimizer steps.
        seed: Seed of the run.
        directory: Output directory of the run.
        pretrained: Exported student to start from, or None.
    """
    at = round(changes.get("switch", SWITCH_AT) * steps)
    kept = ("LearningRateMonitor", "FinalReport", *(("SwitchSolution",) if at < steps else ()))
    settings = scale_steps(demo, steps / demo["trainer"]["max_steps"])
    settings = run_config(settings, seed, directory, keep=lambda name: name in kept)
    model = settings["model"]["init_args"]
    model |= {"alignment": None}
    for path, value in changes.items():
        if path != "switch":
            assign(model, path, value)
    model["student"]["pretrained"] = pretrained
    settings["trainer"] |= {"log_every_n_steps": 5, "val_check_interval": steps}
    for callback in settings["trainer"]["callbacks"]:
        name = callback["class_path"].rsplit(".", 1)[-1]
        if name == "SwitchSolution":
            callback["init_args"] |= {"threshold": None, "earliest_step": at, "latest_step": at, "guard_factor": None}
        elif name == "FinalReport":
            callback["init_args"] |= {"diversity_seeds": 4, "teacher": not changes}  # the teacher is the same in all variants
    return single_process(settings)


def rescaled_student(steps: int, seed: int, directory: Path) -> str:
    """Train a student with rescaled times, and return the directory of its export."""
    if not (directory / "student").is_dir():
        config = full_config("shapes_timestep_rescaling.yaml")
        settings = scale_steps(config, steps / config["trainer"]["max_steps"])
        settings = single_process(run_config(settings, seed, directory, keep=lambda name: name == "ExportPipeline"))
        train(settings, directory, threads=1)
    return str(directory / "student")


def measure(demo: dict[str, Any], name: str, changes: Mapping[str, Any], steps: int, seed: int, runs: Path) -> dict[str, Any]:
    """Train a variant, unless the run is recorded, and return the record.

    Raises:
        SystemExit: If the recorded run had another number of steps.
    """
    file = "".join(letter if letter.isalnum() else "_" for letter in name)
    record, directory = RECORDS / f"{file}-{seed}.json", runs / file / str(seed)
    if not record.is_file():
        pretrained = rescaled_student(steps, seed, runs / file / f"{seed}-rescaling") if name == RESCALED else None
        train(variant_config(demo, changes, steps, seed, directory, pretrained), directory, threads=1)
        summary, curves = json.loads((directory / "summary.json").read_text()), events(directory)
        norms = [event.value for event in curves.Scalars("train/grad_norm")]
        found = {
            "steps": steps,
            "accuracy": summary["student"],
            "diversity": summary["diversity"]["student"],
            "teacher": summary["teacher"],
            "minutes": summary["minutes"],
            "error": curves.Scalars("val/average_velocity_error")[-1].value,
            "gradient_norm": {"median": statistics.median(norms), "largest": max(norms)},
        }
        RECORDS.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(found, indent=1) + "\n")
    recorded: dict[str, Any] = json.loads(record.read_text())
    if recorded["steps"] != steps:
        raise SystemExit(
            f"{record} has {recorded['steps']} steps, and --steps is {steps}; set --steps to the record's, or remove the record"
        )
    return recorded


def merge(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds of a variant, and the standard deviation of accuracy, which is 0 for one seed."""
    accuracy = {n: [record["accuracy"][n] for record in records] for n in STEPS}
    return {
        "accuracy": {n: statistics.mean(values) for n, values in accuracy.items()},
        "std": {n: statistics.stdev(values) if len(values) > 1 else 0.0 for n, values in accuracy.items()},
        "diversity": statistics.mean(record["diversity"]["1"] for record in records),
        "error": statistics.mean(record["error"] for record in records),
        "gradient_norm": {
            name: statistics.mean(record["gradient_norm"][name] for record in records) for name in ("median", "largest")
        },
        "minutes": statistics.mean(record["minutes"] for record in records),
        "seeds": len(records),
    }


def table(groups: Mapping[str, Mapping[str, dict[str, Any]]]) -> str:
    """Markdown table with a row per variant; accuracy in percent."""
    rows = [
        "| | variant | 1 step | 2 steps | 4 steps | 8 steps | diversity at 1 | error of u | gradient norm, median | largest |",
        "|---|---|" + "---:|" * 8,
    ]
    for group, variants in groups.items():
        for name, found in variants.items():
            several = found["seeds"] > 1
            cells = [
                f"{100 * found['accuracy'][n]:.1f}" + (f" ± {100 * found['std'][n]:.1f}" if several else "") for n in STEPS
            ]
            norm = found["gradient_norm"]
            cells += [f"{found['diversity']:.3f}", f"{found['error']:.3f}", f"{norm['median']:.2f}", f"{norm['largest']:.1f}"]
            rows.append(f"| {group} | {name} | {' | '.join(cells)} |")
            group = ""
    return "\n".join(rows)


def write(found: Mapping[str, Mapping[str, list[dict[str, Any]]]], machine: str, steps: int) -> None:
    """Write the results of all runs so far."""
    groups = {
        group: {name: merge(records) for name, records in variants.items() if records} for group, variants in found.items()
    }
    groups = {group: variants for group, variants in groups.items() if variants}
    teachers = [record["teacher"] for variants in found.values() for records in variants.values() for record in records]
    measured = next((teacher for teacher in teachers if teacher), {})
    date = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    result = {"date": date, "machine": machine, "steps": steps, "teacher": measured, "groups": groups}
    (RESULTS / "ablations.json").write_text(json.dumps(result, indent=2) + "\n")
    text = f"{date}, {machine}; {steps} steps a run\n\n{table(groups)}\n"
    if measured:
        text += f"\nTeacher: {', '.join(f'{100 * value:.1f} at {n}' for n, value in measured.items())}.\n"
    (RESULTS / "ablations.md").write_text(text)


def main() -> None:
    """Execute the missing runs, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps per run")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds per variant")
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS), help="groups of variants to run")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="number of parallel runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="output directory of the runs")
    parser.add_argument(
        "--machine", default=f"{platform.machine()}, {os.cpu_count()} cores", help="machine name in the results"
    )
    arguments = parser.parse_args()
    demo = full_config("shapes_meanflow.yaml")
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        group: {name: [] for name in variants} for group, variants in GROUPS.items() if group in arguments.groups
    }

    def run(seed: int, group: str, name: str) -> tuple[str, str, dict[str, Any]]:
        return group, name, measure(demo, name, GROUPS[group][name], arguments.steps, seed, arguments.runs)

    with ThreadPoolExecutor(arguments.workers) as pool:
        # The outer loop is over seeds, so that an interrupted comparison has all variants.
        tasks = [(seed, group, name) for seed in range(arguments.seeds) for group, names in found.items() for name in names]
        for done in as_completed([pool.submit(run, *task) for task in tasks]):
            group, name, record = done.result()
            found[group][name].append(record)
            print(group, "|", name, record["accuracy"], flush=True)
            write(found, arguments.machine, arguments.steps)


if __name__ == "__main__":
    main()
