"""Cost of a MeanFlow training step: the differential solution in one pass against the usual two passes and other steps.

`python benchmarks/step_cost.py` trains a small and a medium FLUX with random weights for a few steps at several sequence
lengths. It writes `benchmarks/results/step_cost_<machine>.json`, a table and a plot. Variants:

- A: a derivative by `torch.func.jvp` on the math attention, without gradients, then a forward pass with gradients;
- B: A, with a checkpointed forward pass;
- C: `value_and_time_derivative`, with and without checkpointing;
- D: flow matching;
- E: the discrete solution, four Euler steps of the teacher.

"forwards" counts the multiplications of linear layers, in units of one forward pass. "rate" is the rate of these
multiplications over the full step, relative to one large matrix product. Times are medians over rounds, in which the variants
alternate. The peak memory is that of a step beside weights and gradients, on a CPU as Linux reports it.

`--device cuda` measures in bfloat16, by default with the shapes of FLUX.1-lite and FLUX.1-dev. `--quick` takes less than a
minute. Rows of other models and lengths in the file of a machine are preserved.
"""

import argparse
import dataclasses
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_distill.flow.derivative import value_and_time_derivative
from lightning_distill.students.two_time_flux import TwoTimeFluxTransformer2DModel

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
SMALL_HEADS = {
    "attention_head_dim": 64,
    "axes_dims_rope": (16, 24, 24),
    "joint_attention_dim": 256,
    "pooled_projection_dim": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "small": {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 4, **SMALL_HEADS},
    "medium": {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 8, **SMALL_HEADS},
    "flux-lite": {"num_layers": 8, "num_single_layers": 38},
    "flux-dev": {"num_layers": 19, "num_single_layers": 38},
}
VARIANTS = [("A", False), ("B", True), ("C", False), ("C", True), ("D", False), ("D", True), ("E", False)]
"""Variants, each with whether its forward pass is checkpointed."""
LINEAR = (torch.ops.aten.mm, torch.ops.aten.addmm)
LABELS = {"A": "two passes", "B": "two passes, checkpointed", "C": "one pass", "D": "flow matching", "E": "discrete"}


@dataclasses.dataclass
class Setting:
    """A model and a batch of one sample."""

    network: TwoTimeFluxTransformer2DModel
    inputs: dict[str, Tensor]
    x: Tensor
    v: Tensor
    r: Tensor
    t: Tensor

    def __call__(self, x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """Average velocity (1, L, C) of a state x (1, L, C)."""
        (u,) = self.network(hidden_states=x, timestep=t, timestep_r=r, return_dict=False, **self.inputs)
        return u


def build(model: str, tokens: int, device: str) -> Setting:
    """Build a model and a sequence of `tokens`, an eighth of them text."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        torch.set_default_dtype(dtype)
        network = TwoTimeFluxTransformer2DModel(
            interval_embedding="zero", time_frequency_bound=2 * torch.pi, **MODELS[model]
        ).train()
        torch.set_default_dtype(torch.float32)
        network.set_attention_backend("native")
        text, image = tokens // 8, tokens - tokens // 8
        config = network.config
        inputs = {
            "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, dtype=dtype),
            "pooled_projections": torch.randn(1, config.pooled_projection_dim, dtype=dtype),
            "img_ids": torch.stack([torch.zeros(image), torch.arange(image) // 64, torch.arange(image) % 64], -1),
            "txt_ids": torch.zeros(text, 3),
        }
        x, v = torch.randn(2, 1, image, config.in_channels, dtype=dtype)
        return Setting(network, inputs, x, v, torch.tensor([0.2]), torch.tensor([0.8]))


def loss(setting: Setting, variant: str) -> Tensor:
    """Loss of one training step."""
    x, v, r, t = setting.x, setting.v, setting.r, setting.t
    if variant in ("A", "B"):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            _, dudt = torch.func.jvp(setting, (x, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
        u, target = setting(x, r, t), v - (t - r) * dudt
    elif variant == "C":
        u, dudt = value_and_time_derivative(setting, x, r, t, v)
        target = v - (t - r) * dudt
    elif variant == "D":
        u, target = setting(x, t, t), v
    else:
        with torch.no_grad():
            x_s, times = x, torch.lerp(t, r, torch.linspace(0, 1, 5, device=t.device)[:, None]).unbind()
            for start, end in pairwise(times):
                x_s = x_s - (start - end).to(x.dtype) * setting(x_s, start, start)
            target = ((x - x_s).float() / (t - r)).to(x.dtype)
        u = setting(x, r, t)
    return (u - target.to(u.dtype)).float().square().mean()


def step(setting: Setting, variant: str) -> None:
    """Execute the forward and backward pass of one training step."""
    loss(setting, variant).backward()
    setting.network.zero_grad(set_to_none=False)


def prepare(setting: Setting, checkpointing: bool) -> None:
    """Turn checkpointing on or off."""
    (setting.network.enable_gradient_checkpointing if checkpointing else setting.network.disable_gradient_checkpointing)()


def products(run: Callable[[], object]) -> int:
    """Number of multiplications and additions of linear layers in a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if operation in LINEAR)


def one_forward(setting: Setting) -> int:
    """Number of multiplications and additions of linear layers in one forward pass."""
    with torch.no_grad():
        return products(lambda: setting(setting.x, setting.r, setting.t))


def forwards(setting: Setting, variant: str) -> float:
    """Multiplications of linear layers in a step, in units of one forward pass."""
    return products(lambda: step(setting, variant)) / one_forward(setting)


def matrix_rate(device: str, rounds: int = 5) -> float:
    """Multiplications and additions per second of one large matrix product, in the dtype of the device's steps."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:])


def peaks(model: str, tokens: int, device: str) -> dict[tuple[str, bool], float]:
    """Peak memory in MiB of one step of each variant beside weights and gradients; on a CPU, measured in a subprocess."""
    if device == "cuda":
        return dict(zip(VARIANTS, measured_peaks(model, tokens, device), strict=True))
    command = [sys.executable, __file__, "--peaks", model, str(tokens)]
    # Freed memory returns to the system at once, so that the peak is that of live memory.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return dict(zip(VARIANTS, json.loads(printed.splitlines()[-1]), strict=True))


def measured_peaks(model: str, tokens: int, device: str) -> list[float]:
    """Peak memory in MiB of all variants. Steps at the shortest sequence come first, because they initialize libraries."""
    for short, length in ((True, 64), (False, tokens)):
        setting = build("small" if short else model, length, device)
        for parameter in setting.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        found = []
        for variant, checkpointing in VARIANTS:
            prepare(setting, checkpointing)
            gc.collect()
            before = in_use(device, reset=True)
            step(setting, variant)
            found.append(in_use(device, peak=True) - before)
    return found


def in_use(device: str, *, peak: bool = False, reset: bool = False) -> float:
    """Memory in use in MiB: the current value, or the peak since the last reset."""
    if device == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak on Linux
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM" if peak else "VmRSS"].split()[0]) / 2**10


def seconds(setting: Setting, rounds: int, variants: list[tuple[str, bool]]) -> dict[tuple[str, bool], list[float]]:
    """Times of all variants, which alternate, so that fluctuations of the machine affect them equally."""
    times: dict[tuple[str, bool], list[float]] = {variant: [] for variant in variants}
    for i in range(rounds + 1):
        for variant, checkpointing in variants:
            prepare(setting, checkpointing)
            start = time.perf_counter()
            step(setting, variant)
            if setting.x.is_cuda:
                torch.cuda.synchronize()
            if i > 0:  # the first round warms up
                times[variant, checkpointing].append(time.perf_counter() - start)
    return times


def measure(model: str, tokens: int, rounds: int, device: str, machine: str) -> list[dict[str, Any]]:
    """Rows of the results for one model at one sequence length."""
    setting = build(model, tokens, device)
    times = seconds(setting, rounds, VARIANTS)
    counts, one, rate = {}, one_forward(setting), matrix_rate(device)
    for variant, checkpointing in VARIANTS:
        prepare(setting, checkpointing)
        counts[variant, checkpointing] = forwards(setting, variant)
    del setting
    peak = peaks(model, tokens, device)
    median = {key: statistics.median(values) for key, values in times.items()}
    rows = []
    for key in VARIANTS:
        quartiles = statistics.quantiles(times[key], n=4) if rounds > 1 else [median[key]] * 3
        rows.append(
            {
                "model": model,
                "tokens": tokens,
                "variant": key[0],
                "checkpointing": key[1],
                "forwards": round(counts[key], 3),
                "seconds": median[key],
                "seconds_quartiles": [quartiles[0], quartiles[2]],
                "peak_mib": round(peak[key], 1),
                "seconds_over_A": median[key] / median["A", False],
                "rate": counts[key] * one / median[key] / rate,
                "memory_over_A": peak[key] / peak["A", False],
                "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
                "machine": machine,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of the rows."""
    lines = [
        "| model | tokens | step | forwards | seconds | of A's | rate | peak MiB | of A's |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        name = f"{row['variant']}: {LABELS[row['variant']]}"
        if row["checkpointing"] and row["variant"] != "B":
            name += ", checkpointed"
        lines.append(
            f"| {row['model']} | {row['tokens']} | {name} | {row['forwards']:.2f} | {row['seconds']:.3f} | "
            f"{row['seconds_over_A']:.2f} | {row['rate']:.2f} | {row['peak_mib']:.0f} | {row['memory_over_A']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot time and memory relative to A against the sequence length."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, (key, label) in zip(
        panels, {"seconds_over_A": "time / A's", "memory_over_A": "peak memory / A's"}.items(), strict=True
    ):
        for model in dict.fromkeys(row["model"] for row in rows):
            for variant, checkpointing in VARIANTS:
                found = [r for r in rows if (r["model"], r["variant"], r["checkpointing"]) == (model, variant, checkpointing)]
                name = LABELS[variant] + (", checkpointed" if checkpointing and variant != "B" else "")
                style = "-" if model == rows[-1]["model"] else "--"
                axes.plot([r["tokens"] for r in found], [r[key] for r in found], style, marker=".", label=f"{name} ({model})")
        axes.set(xscale="log", xlabel="tokens", ylabel=label, ylim=(0, None))
        lengths = [n for n in sorted({row["tokens"] for row in rows}) if n != 4608]  # 4,096 is too close for a label
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[1].legend(fontsize=6)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Measure the variants, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="models; by default those for the device")
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024, 4096, 4608], help="sequence lengths")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per variant")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="the small model at 256 and 1,024 tokens, three rounds")
    parser.add_argument("--machine", default=f"{platform.machine()}-{os.cpu_count()}-cores", help="machine name in the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument("--peaks", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peaks:
        print(json.dumps(measured_peaks(arguments.peaks[0], int(arguments.peaks[1]), "cpu")))
        return
    models = arguments.models or (["flux-lite", "flux-dev"] if arguments.device == "cuda" else ["small", "medium"])
    lengths, rounds = arguments.tokens, arguments.rounds
    if arguments.quick:
        models, lengths, rounds = models[:1], [256, 1024], 3
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"step_cost_{arguments.machine}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    for model in models:
        for tokens in lengths:
            measured = measure(model, tokens, rounds, arguments.device, arguments.machine)
            rows = [row for row in rows if (row["model"], row["tokens"]) != (model, tokens)] + measured
            rows.sort(
                key=lambda row: (list(MODELS).index(row["model"]), row["tokens"])
            )  # a stable sort preserves the order of variants
            path.write_text(json.dumps(rows, indent=1) + "\n")
            path.with_suffix(".md").write_text(table(rows))
            plot(rows, path.with_suffix(".png"))
            print(table(measured), flush=True)


if __name__ == "__main__":
    main()
