"""Cost of a full MeanFlow training step (teacher, guidance, derivative, loss, backward pass) relative to flow matching.

`python benchmarks/training_step.py` executes alternating steps of both methods on a FLUX with random weights. It writes
`benchmarks/results/training_step_<machine>.json`. Variants are two-branch guidance, embedded guidance, and the bootstrapped
solution.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from lightning_distill.methods import FlowMatching, Guidance, MeanFlow, ValidationOptions
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.teachers import DiffusersAdapter
from lightning_distill.teachers.embedded import build_flux_pipeline

RESULTS = Path(__file__).resolve().parent / "results"
SHAPE = {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 8, "attention_head_dim": 64}
TEXT_TOKENS = 64


def save_pipeline(directory: Path, guidance_embeds: bool) -> str:
    """Save a FLUX pipeline with random weights and a tiny autoencoder and tiny text encoders; returns its directory."""
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=4,
    )
    pipeline = build_flux_pipeline(vae, ["a", "circle"], max_length=TEXT_TOKENS, axes_dims_rope=(16, 24, 24), **SHAPE)
    if guidance_embeds:
        config = {name: value for name, value in pipeline.transformer.config.items() if not name.startswith("_")}
        pipeline.transformer = FluxTransformer2DModel(**{**config, "guidance_embeds": True})
    pipeline.save_pretrained(directory)
    return str(directory)


def methods(directory: Path) -> dict[str, TeacherStudentBase]:
    """Flow matching, the reference, and the measured methods, each with separate networks."""
    plain, embedded = (save_pipeline(directory / str(embeds), embeds) for embeds in (False, True))
    validation = ValidationOptions(nfe=(1,))
    two_branch, one_input = Guidance(scale=2.0), Guidance(kind="embedded", scale=3.5)
    found: dict[str, TeacherStudentBase] = {
        "flow matching": FlowMatching(DiffusersAdapter(plain), validation=validation),
        "differential, two branches": MeanFlow(
            DiffusersAdapter(plain), guidance=two_branch, solution="differential", validation=validation
        ),
        "differential, embedded guidance": MeanFlow(
            DiffusersAdapter(embedded), guidance=one_input, solution="differential", validation=validation
        ),
        "bootstrapped, two branches": MeanFlow(
            DiffusersAdapter(plain), guidance=two_branch, solution="bootstrapped", validation=validation
        ),
    }
    for method in found.values():
        method.setup("fit")
        method.configure_model()
    return found


def stepper(method: TeacherStudentBase, side: int, batch: int) -> Callable[[], None]:
    """Function that executes a training step of a method, without the optimizer step, which is the same for all methods."""
    x0 = torch.randn(batch, 16, side, side)
    condition = method.encoder.encode_prompt(["a circle"] * batch)

    def step() -> None:
        method.evaluate_objective(x0, condition).loss.mean().backward()
        method.zero_grad(set_to_none=True)

    return step


def main() -> None:
    """Measure the steps, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024], help="image tokens, squares of even numbers")
    parser.add_argument("--batch", type=int, default=4, help="samples per step; a quarter of them have r = t")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per method")
    parser.add_argument("--machine", default=f"{platform.machine()}-{os.cpu_count()}-cores", help="machine name in the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        found = methods(Path(directory))
    for tokens in arguments.tokens:
        side = 2 * round(tokens**0.5)
        steps = {name: stepper(method, side, arguments.batch) for name, method in found.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(arguments.rounds + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if i > 0:  # the first round warms up
                    times[name].append(time.perf_counter() - start)
        median = {name: statistics.median(values) for name, values in times.items()}
        for name in steps:
            ratio = median[name] / median["flow matching"]
            rows.append({"tokens": tokens, "step": name, "seconds": median[name], "over_flow_matching": ratio})
            print(f"{tokens} tokens, {name}: {median[name]:.2f} s, {ratio:.2f} of flow matching", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    result = {"date": date, "machine": arguments.machine, "batch": arguments.batch, "model": SHAPE, "rows": rows}
    (arguments.out / f"training_step_{arguments.machine}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
