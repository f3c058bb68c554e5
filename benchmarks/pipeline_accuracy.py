"""Prompt accuracy and diversity of the images of a Shapes pipeline, by number of steps and category.

`python benchmarks/pipeline_accuracy.py` generates images with the shipped teacher, by diffusers' stock pipeline, and writes
`benchmarks/results/shapes-teacher.json` and `.md`. The first noise selects the guidance scale. The results are those of the
other noises, which had no part in the selection. `--pipeline shapes-student --guidance 1` measures a student.

Images of a prompt differ most in their backgrounds. A separate metric therefore measures the diversity of layouts. It is the
diversity of the chroma (max - min over RGB), which is 0 on every background and 1 on every object.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

from lightning_distill.commands.generation import guidance_arguments
from lightning_distill.commands.pipelines import load_pipeline
from lightning_distill.data.shapes import CATEGORIES
from lightning_distill.data.shapes_datamodule import evaluation_prompts
from lightning_distill.metrics import PromptAccuracy, prompt_diversity

RESULTS = Path(__file__).resolve().parent / "results"
BATCH = 60
DIVERSITY = (60, 8)
"""Number of prompts, and of images per prompt."""


def generate(pipeline: FluxPipeline, prompts: list[str], seeds: list[int], nfe: int, guidance: float) -> torch.Tensor:
    """Images (B, 3, 32, 32) in [0, 1] of B prompts, each from the noise of its seed."""
    images = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        images.append(
            pipeline(
                batch,
                num_inference_steps=nfe,
                height=32,
                width=32,
                max_sequence_length=pipeline.tokenizer_2.model_max_length,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + BATCH]],
                output_type="pt",
                **guidance_arguments(pipeline, guidance, len(batch)),
            ).images
        )
    return torch.cat(images)


def accuracy(pipeline: FluxPipeline, prompts: list[str], noise: int, nfe: int, guidance: float) -> dict[str, float]:
    """Prompt accuracy with one noise per prompt, by category and overall."""
    metric = PromptAccuracy()
    seeds = [10**7 * (noise + 1) + i for i in range(len(prompts))]
    metric.update(generate(pipeline, prompts, seeds, nfe, guidance), prompts)
    return {name: value.item() for name, value in metric.compute().items()}


def diversity(pipeline: FluxPipeline, prompts: list[str], nfe: int, guidance: float) -> tuple[float, float]:
    """Diversity of the images of some prompts, and diversity of their layouts."""
    count, images_per_prompt = DIVERSITY
    chosen = [prompt for prompt in dict.fromkeys(prompts)][:count]
    repeated = [prompt for prompt in chosen for _ in range(images_per_prompt)]
    images = generate(pipeline, repeated, [10**9 + i for i in range(len(repeated))], nfe, guidance)
    chroma = images.amax(1, keepdim=True) - images.amin(1, keepdim=True)
    return prompt_diversity(images, repeated).item(), prompt_diversity(chroma, repeated).item()


def table(result: dict[str, Any]) -> str:
    """Markdown table with a row per number of steps."""
    names = ("overall", *CATEGORIES)
    rows = [f"| steps | {' | '.join(names)} | diversity | of layouts |", "|---:|" + "---:|" * (len(names) + 2)]
    for nfe, found in result["accuracy"].items():
        cells = " | ".join(f"{100 * found[name]:.1f}" for name in names)
        rows.append(f"| {nfe} | {cells} | {result['diversity'][nfe]:.3f} | {result['layout_diversity'][nfe]:.3f} |")
    return "\n".join(rows)


def main() -> None:
    """Measure the pipeline, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="shapes-teacher", help="shipped name or directory")
    parser.add_argument("--name", help="name of the result files; by default that of the pipeline")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="numbers of steps")
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[2.0, 3.0, 4.0, 5.0], help="guidance scales to select from"
    )
    parser.add_argument("--per-category", type=int, default=100, help="number of prompts per category")
    parser.add_argument("--noises", type=int, default=3, help="number of measured noises per prompt")
    parser.add_argument(
        "--machine", default=f"{platform.machine()}, {os.cpu_count()} cores", help="machine name in the results"
    )
    arguments = parser.parse_args()
    pipeline = load_pipeline(arguments.pipeline, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [prompt.text for prompt in evaluation_prompts(arguments.per_category, held_out=False)]
    most = max(arguments.steps)
    chosen, choice = arguments.guidance[0], {}
    if len(arguments.guidance) > 1:
        choice = {f"{g:g}": accuracy(pipeline, prompts, 0, most, g)["overall"] for g in arguments.guidance}
        chosen = float(max(choice, key=lambda g: choice[g]))
    result: dict[str, Any] = {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "machine": arguments.machine,
        "pipeline": arguments.pipeline,
        "prompts": len(prompts),
        "noises": arguments.noises,
        "guidance_scale": chosen,
        "chosen_on_another_noise": choice,
        "accuracy": {},
        "each_noise": {},
        "diversity": {},
        "layout_diversity": {},
    }
    for nfe in arguments.steps:
        found = [accuracy(pipeline, prompts, 1 + i, nfe, chosen) for i in range(arguments.noises)]
        result["accuracy"][str(nfe)] = {name: statistics.mean(one[name] for one in found) for name in found[0]}
        result["each_noise"][str(nfe)] = [one["overall"] for one in found]
        result["diversity"][str(nfe)], result["layout_diversity"][str(nfe)] = diversity(pipeline, prompts, nfe, chosen)
    RESULTS.mkdir(exist_ok=True)
    name = arguments.name or Path(arguments.pipeline).name
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    heading = f"{result['date']}, {arguments.machine}; guidance {chosen:g}, {len(prompts)} prompts x {arguments.noises} noises"
    (RESULTS / f"{name}.md").write_text(f"{heading}\n\n{table(result)}\n")
    print(f"{heading}\n\n{table(result)}")


if __name__ == "__main__":
    main()
