"""`lightning-distill sample`: generate images with a pipeline, an export, or LoRA files on a base."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from lightning_distill.commands import PROGRAM
from lightning_distill.commands.base_pipelines import WeightFile, find_weights
from lightning_distill.commands.generation import generate
from lightning_distill.commands.image_output import check_output, write_directory, write_grid
from lightning_distill.commands.pipelines import load_pipeline
from lightning_distill.commands.student_choice import (
    DEFAULT_NFE,
    STOCK,
    Choice,
    check_students,
    choose_export,
    read_mark,
    steps_of,
)
from lightning_distill.data.prompts import read_prompts
from lightning_distill.errors import ConfigurationError
from lightning_distill.export.shipped import STEPS, stock_form
from lightning_distill.paths import expand_path
from lightning_distill.students.few_step import FewStepPipeline
from lightning_distill.teachers.pipeline_source import PipelineSource
from lightning_distill.teachers.registry import SHIPPED, resolve_pretrained
from lightning_distill.teachers.shipped import has_shared_components

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str], name: str = "sample") -> None:
    """Generate images and write them to a PNG file or a directory.

    Args:
        argv: Arguments after the name of the subcommand.
        name: Name of the subcommand.

    Raises:
        ConfigurationError: If an argument is invalid.
    """
    arguments = build_parser(name).parse_args(argv)
    prompts = _checked_prompts(arguments)
    out = Path(expand_path(arguments.out, "--out"))
    in_directory = check_output(out)
    loras = [_lora(each) for each in arguments.lora]
    choice = _choice(arguments, loras)
    named = {f"{each.source.setting} {each.source.value!r}": each.mark for each in loras}
    check_students({f"--pipeline {choice.name!r}": choice.mark, **named}, len(loras))
    nfe = steps_of(arguments.nfe, {f"--pipeline {choice.name!r}": choice.mark, **named})
    marks = [mark for mark in (choice.mark, *named.values()) if mark is not None]
    if choice.name != arguments.pipeline and arguments.pipeline is not None:
        print(f"generates with {choice.name}")
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    pipeline = _load(arguments, choice, loras, nfe)
    if isinstance(pipeline, DiffusionPipeline):
        pipeline.set_progress_bar_config(disable=True)
    distilled = [mark for mark in marks if mark.kind in STOCK]
    height, width = (
        getattr(arguments, side) or next((getattr(mark, side) for mark in distilled if getattr(mark, side)), None)
        for side in ("height", "width")
    )
    count = arguments.num_images
    batches = generate(
        pipeline,
        [prompt for prompt in prompts for _ in range(count)],
        nfe=nfe,
        seed=arguments.seed,
        height=height,
        width=width,
        guidance_scale=arguments.guidance_scale,
        arguments=distilled[0].arguments if distilled else None,
        grid_scale=None if in_directory else arguments.scale,
    )
    if in_directory:
        written = write_directory(batches, out, arguments.scale, prompts, count, arguments.seed)
        print(f"wrote {written} images to {out}")
    else:
        write_grid(torch.cat([*batches]), out, arguments.scale, count if count > 1 else None)
        print(f"wrote {out}")


def _checked_prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts, after checks of the numbers among the arguments."""
    if arguments.nfe is not None and arguments.nfe < 1:
        raise ConfigurationError(f"--nfe is {arguments.nfe}; set it to at least 1 step")
    for option, value in (("height", arguments.height), ("width", arguments.width)):
        if value is not None and value < 1:
            raise ConfigurationError(f"--{option} is {value}; set it to at least 1 pixel, or leave it out")
    if arguments.scale < 1:
        raise ConfigurationError(f"--scale is {arguments.scale}; set it to an integer of at least 1")
    if arguments.num_images < 1:
        raise ConfigurationError(f"--num_images is {arguments.num_images}; set it to at least 1 image per prompt")
    if arguments.prompts_file is not None:
        file = Path(expand_path(arguments.prompts_file, "--prompts_file"))
        prompts = read_prompts(file, "--prompts_file", arguments.caption_column, "--caption_column")
    elif arguments.caption_column is not None:
        raise ConfigurationError(
            f"--caption_column is {arguments.caption_column!r}, but there is no --prompts_file; leave --caption_column out"
        )
    else:
        prompts = arguments.prompt
    if not 0 <= arguments.seed < 2**63 - len(prompts) * arguments.num_images:
        raise ConfigurationError(
            f"--seed is {arguments.seed}; set it to 0 or more, and to less than 2^63 minus the number of images"
        )
    return list(prompts)


def _lora(values: Sequence[str]) -> WeightFile:
    """The LoRA file of one `--lora PATH [WEIGHT]`."""
    path, *weights = values
    try:
        (weight,) = map(float, weights or ["1"])
    except ValueError as error:
        raise ConfigurationError(f"--lora is {' '.join(values)!r}; give a path, and at most one weight") from error
    return find_weights(path, "--lora", weight)


def _choice(arguments: argparse.Namespace, loras: Sequence[WeightFile]) -> Choice:
    if arguments.pipeline is not None:
        return choose_export(expand_path(arguments.pipeline, "--pipeline"), arguments.nfe)
    if not loras or arguments.base is None:
        raise ConfigurationError("there is no --pipeline; set it, or set --base and --lora to a pipeline and LoRA files for it")
    mark = read_mark(Path(expand_path(arguments.base, "--base")), PipelineSource("--base", arguments.base))
    if mark is not None and mark.kind == "stock":
        raise ConfigurationError(
            f"--base is {arguments.base!r}, a few-step student; give it as --pipeline, or set --base to the base of the LoRA"
        )
    return Choice(arguments.base, None)


def _load(
    arguments: argparse.Namespace, choice: Choice, loras: Sequence[WeightFile], nfe: int
) -> DiffusionPipeline | PreTrainedModel:
    base = None if arguments.base is None else expand_path(arguments.base, "--base")
    pipeline = load_pipeline(
        None if arguments.pipeline is None else choice.name,
        arguments.trust_remote_code,
        DTYPES[arguments.torch_dtype],
        base,
        loras,
    )
    if nfe in STEPS and isinstance(pipeline, FewStepPipeline) and has_shared_components(Path(resolve_pretrained(choice.name))):
        return stock_form(choice.name, pipeline, nfe)
    return pipeline


def build_parser(name: str = "sample") -> argparse.ArgumentParser:
    """Parser of the arguments."""
    parser = argparse.ArgumentParser(
        f"{PROGRAM} {name}", description="Generate images with a pipeline, an export, or LoRA files.", allow_abbrev=False
    )
    known = f"directory of an export or of a stock pipeline of a known family, or {', '.join(SHIPPED)}"
    parser.add_argument("--pipeline", help=known)
    parser.add_argument(
        "--base",
        help="directory or hub id of the base of LoRA or of a single transformer (default: that of the export)",
    )
    parser.add_argument(
        "--lora",
        action="append",
        nargs="+",
        default=[],
        metavar=("PATH", "WEIGHT"),
        help="LoRA file, or directory with one, for a stock pipeline, and its weight (default: 1); may be repeated",
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="may be repeated")
    prompts.add_argument("--prompts_file", help="prompts in a .txt, .jsonl, .json, .csv, .tsv or .parquet file")
    parser.add_argument("--caption_column", help="column of the prompts in a table (default: text, caption or prompt)")
    parser.add_argument("--num_images", type=int, default=1, help="images of each prompt, a row of the grid (default: 1)")
    parser.add_argument("--out", required=True, help="PNG file for a grid of all images, or directory for a file an image")
    parser.add_argument(
        "--nfe", type=int, help=f"steps (default: those that the export is for, or {DEFAULT_NFE} if it is for any number)"
    )
    parser.add_argument("--seed", type=int, default=0, help="image i starts from the noise of seed + i (default: 0)")
    parser.add_argument("--height", type=int, help="pixels (default: that of the export, or of the autoencoder's training)")
    parser.add_argument("--width", type=int, help="pixels (default: that of the export, or of the autoencoder's training)")
    parser.add_argument(
        "--guidance_scale",
        type=float,
        help="default: 3.5 if the transformer embeds it, otherwise 1, without guidance; students have guidance built in",
    )
    parser.add_argument("--scale", type=int, default=1, help="factor of a nearest-neighbor enlargement (default: 1)")
    parser.add_argument("--torch_dtype", choices=DTYPES, default="float32", help="precision (default: float32)")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python files in the directory that are not of this package"
    )
    return parser
