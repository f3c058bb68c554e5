"""`lightning-distill sample`: generate images with a pipeline directory."""

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from lightning_distill.commands import PROGRAM
from lightning_distill.commands.pipelines import is_student, load_pipeline
from lightning_distill.errors import ConfigurationError
from lightning_distill.outputs import atomic_file, check_file
from lightning_distill.paths import expand_path
from lightning_distill.students.few_step import FewStepPipeline, unwrap_tokenizer
from lightning_distill.teachers.families import FAMILIES, stock_options
from lightning_distill.teachers.registry import SHIPPED

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCH_SIZE = 8
GAP = 2
"""White pixels between the images of a grid, before enlargement."""


def main(argv: Sequence[str], name: str = "sample") -> None:
    """Generate images and write them to a PNG file.

    Args:
        argv: Arguments after the name of the subcommand.
        name: Name of the subcommand.

    Raises:
        ConfigurationError: If an argument is invalid.
    """
    arguments = build_parser(name).parse_args(argv)
    if arguments.nfe < 1:
        raise ConfigurationError(f"--nfe is {arguments.nfe}; set it to at least 1 step")
    for option, value in (("height", arguments.height), ("width", arguments.width)):
        if value is not None and value < 1:
            raise ConfigurationError(f"--{option} is {value}; set it to at least 1 pixel, or leave it out")
    if not 0 <= arguments.seed < 2**63 - len(arguments.prompt):
        raise ConfigurationError(
            f"--seed is {arguments.seed}; set it to 0 or more, and to less than 2^63 minus the number of prompts"
        )
    if arguments.scale < 1:
        raise ConfigurationError(f"--scale is {arguments.scale}; set it to an integer of at least 1")
    out = Path(expand_path(arguments.out, "--out"))
    if out.suffix.lower() != ".png":
        raise ConfigurationError(f"--out is {str(out)!r}; set it to a file name that ends in .png")
    check_file(out, "--out")
    base = None if arguments.base is None else expand_path(arguments.base, "--base")
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    dtype = DTYPES[arguments.torch_dtype]
    name = expand_path(arguments.pipeline, "--pipeline")
    pipeline = load_pipeline(name, arguments.trust_remote_code, dtype, base)
    if isinstance(pipeline, DiffusionPipeline):
        pipeline.set_progress_bar_config(disable=True)
    images = sample(
        pipeline,
        arguments.prompt,
        nfe=arguments.nfe,
        seed=arguments.seed,
        height=arguments.height,
        width=arguments.width,
        guidance_scale=arguments.guidance_scale,
        scale=arguments.scale,
    )
    write_grid(images, out, arguments.scale)
    print(f"wrote {out}")


def build_parser(name: str = "sample") -> argparse.ArgumentParser:
    """Parser of the arguments."""
    parser = argparse.ArgumentParser(
        f"{PROGRAM} {name}", description="Generate images with a pipeline directory.", allow_abbrev=False
    )
    known = f"directory of an exported student or of a stock pipeline of a known family, or {', '.join(SHIPPED)}"
    parser.add_argument("--pipeline", required=True, help=known)
    parser.add_argument("--base", help="base of a student exported without it: directory or hub id (default: its teacher)")
    parser.add_argument("--prompt", action="append", required=True, help="several prompts give a grid of images")
    parser.add_argument("--out", required=True, help="PNG file to write")
    parser.add_argument("--nfe", type=int, default=4, help="steps (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="image i starts from the noise of seed + i (default: 0)")
    parser.add_argument("--height", type=int, help="pixels (default: training size of the autoencoder)")
    parser.add_argument("--width", type=int, help="pixels (default: training size of the autoencoder)")
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


def sample(
    pipeline: DiffusionPipeline | PreTrainedModel,
    prompts: Sequence[str],
    *,
    nfe: int,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    guidance_scale: float | None = None,
    scale: int = 1,
) -> Tensor:
    """Generate images (B, 3, H, W) in [0, 1] for B prompts; image i starts from the noise of `seed + i`.

    Args:
        pipeline: Pipeline of a student, or stock pipeline of a known family, from `load_pipeline`.
        prompts: B prompts.
        nfe: Number of steps.
        seed: Seed of the first image.
        height: Height in pixels; None means the training size of the autoencoder.
        width: Width in pixels; None means the training size of the autoencoder.
        guidance_scale: Guidance scale: an input if the transformer embeds it, otherwise the scale of two-branch guidance.
        scale: Factor of a later enlargement, which the memory has to suffice for as well.

    Raises:
        ConfigurationError: If the image size does not fit the family or the memory, a student has its guidance built in, or a
            word-level tokenizer does not know a word.
    """
    if isinstance(pipeline, PreTrainedModel):
        return _sample_hunyuan_image3(pipeline, prompts, nfe, seed, height, width, guidance_scale, scale)
    family = few_step(pipeline)
    for prompt in prompts:
        check_words(family, prompt)
    settings: dict[str, Any] = {**_checked_size(family, height, width), "num_inference_steps": nfe, "output_type": "pt"}
    check_memory(family, len(prompts), settings["height"], settings["width"], scale)
    # By default stock pipelines pad prompts to a fixed length, which may differ from the length in training.
    settings |= stock_options(type(pipeline), family.sequence_length)
    images = []
    for batch, generators in _batches(prompts, seed):
        guidance = guidance_arguments(pipeline, guidance_scale, len(batch))
        images.append(pipeline(prompt=batch, generator=generators, **settings, **guidance).images.float().cpu())
    return torch.cat(images)


def _sample_hunyuan_image3(
    student: Any,
    prompts: Sequence[str],
    nfe: int,
    seed: int,
    height: int | None,
    width: int | None,
    guidance_scale: float | None,
    scale: int,
) -> Tensor:
    """Generate images with a student of HunyuanImage 3.0, which is not a diffusers pipeline."""
    if not student.embeds_guidance and guidance_scale not in (None, 1):
        raise _guidance_is_built_in(guidance_scale)
    settings: dict[str, Any] = {"num_inference_steps": nfe, "guidance_scale": guidance_scale, "output_type": "pt"}
    settings |= _checked_size(student, height, width)
    check_memory(student, len(prompts), settings["height"], settings["width"], scale)
    images = [student.sample_images(batch, generator=generators, **settings) for batch, generators in _batches(prompts, seed)]
    return torch.cat([each.float().cpu() for each in images])


def _checked_size(family: Any, height: int | None, width: int | None) -> dict[str, int]:
    height, width = height or family.default_size, width or family.default_size
    try:
        family.latent_shape(height, width)
    except ValueError as error:
        raise ConfigurationError(f"--height {height} and --width {width}: {error}") from error
    return {"height": height, "width": width}


def check_memory(family: Any, count: int, height: int, width: int, scale: int = 1) -> None:
    """Check that images of a size can fit into memory at all, before the sampling starts.

    This is a lower bound: the last feature map of the autoencoder's decoder, twice, and the grid of images. Sampling may need
    more.

    Args:
        family: Pipeline with an autoencoder.
        count: Number of images.
        height: Height of an image in pixels.
        width: Width of an image in pixels.
        scale: Factor of the grid's enlargement.

    Raises:
        ConfigurationError: If the images need more memory than the device, or the machine for the grid, has.
    """
    device = family.vae.device
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    decoder_total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else total
    channels = min(family.vae.config.get("block_out_channels") or [3])
    decoding = 2 * min(count, BATCH_SIZE) * channels * height * width * family.vae.dtype.itemsize
    grid = 3 * count * height * width * (4 + 2 * scale**2)  # float32 images, and two copies of the 8-bit grid
    for needed, available, remedy in (
        (decoding, decoder_total, "set smaller ones, or give fewer prompts"),
        (grid, total, f"set smaller ones, or a smaller --scale than {scale}"),
    ):
        if needed > available:
            raise ConfigurationError(
                f"--height {height} and --width {width}: {count} images of this size need at least {needed / 2**30:.0f} GiB of "
                f"memory, and there are {available / 2**30:.0f} GiB; {remedy}"
            )


def _batches(prompts: Sequence[str], seed: int) -> Iterator[tuple[list[str], list[torch.Generator]]]:
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = list(prompts[start : start + BATCH_SIZE])
        yield batch, [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]


def few_step(pipeline: DiffusionPipeline) -> FewStepPipeline:
    """Pipeline of a student unchanged, or the few-step pipeline of a teacher's family with the teacher's components."""
    if is_student(pipeline):
        student: FewStepPipeline = pipeline
        return student
    return FAMILIES[type(pipeline).__name__](**pipeline.components)


def guidance_arguments(pipeline: DiffusionPipeline, guidance_scale: float | None, batch_size: int) -> dict[str, Any]:
    """Arguments of a pipeline call for guidance: an embedded scale, two-branch guidance, or none for most students."""
    embeds_guidance = bool(pipeline.transformer.config.get("guidance_embeds", False))
    if is_student(pipeline) and not embeds_guidance:
        if guidance_scale is None or guidance_scale == 1:
            return {}
        raise _guidance_is_built_in(guidance_scale)
    scale = (3.5 if embeds_guidance else 1.0) if guidance_scale is None else guidance_scale
    if is_student(pipeline):
        return {"guidance_scale": scale}
    arguments = FAMILIES[type(pipeline).__name__].stock_guidance(scale, embeds_guidance)
    return {name: [value] * batch_size if name == "negative_prompt" else value for name, value in arguments.items()}


def _guidance_is_built_in(guidance_scale: float | None) -> ConfigurationError:
    return ConfigurationError(
        f"--guidance_scale is {guidance_scale:g}, but this student has its guidance built in; leave --guidance_scale out"
    )


def check_words(pipeline: FewStepPipeline, prompt: str) -> None:
    """Check the words of a prompt against the vocabulary of a word-level tokenizer; subword tokenizers accept all words.

    Raises:
        ConfigurationError: If a word is not in the vocabulary.
    """
    tokenizer = unwrap_tokenizer(getattr(pipeline, pipeline.prompt_tokenizer))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "WordLevel":
        return
    vocabulary = tokenizer.get_vocab()
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(prompt)]
    unknown = [piece for piece in pieces if piece not in vocabulary]
    if unknown:
        known = ", ".join(sorted(vocabulary.keys() - set(tokenizer.all_special_tokens)))
        raise ConfigurationError(
            f"--prompt {prompt!r} has the unknown word {unknown[0]!r}; use words of this pipeline's vocabulary: {known}"
        )


def write_grid(images: Tensor, file: Path, scale: int = 1) -> None:
    """Write images (B, 3, H, W) in [0, 1] to one PNG file, as an approximately square grid.

    Args:
        images: The images.
        file: PNG file to write.
        scale: Factor of a nearest-neighbor enlargement.
    """
    count, _, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = torch.ones(3, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    for i, image in enumerate(images):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        grid[:, top : top + height, left : left + width] = image
    pixels = (grid.clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    with atomic_file(file) as output:
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(output, format="png")
