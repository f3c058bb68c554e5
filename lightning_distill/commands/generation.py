"""Images of pipelines for `sample`: students, stock exports and teachers, each image from the noise of its own seed."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import PreTrainedModel

from lightning_distill.commands.pipelines import is_student
from lightning_distill.errors import ConfigurationError
from lightning_distill.students.few_step import FewStepPipeline, unwrap_tokenizer
from lightning_distill.teachers.families import FAMILIES, stock_options

BATCH_SIZE = 8


def sample(pipeline: DiffusionPipeline | PreTrainedModel, prompts: Sequence[str], **settings: Any) -> Tensor:
    """Generate images (B, 3, H, W) in [0, 1] for B prompts, as `generate` does, all at once."""
    return torch.cat([*generate(pipeline, prompts, **settings)])


def generate(
    pipeline: DiffusionPipeline | PreTrainedModel,
    prompts: Sequence[str],
    *,
    nfe: int,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    guidance_scale: float | None = None,
    arguments: Mapping[str, Any] | None = None,
    grid_scale: int | None = None,
) -> Iterator[Tensor]:
    """Generate images (B, 3, H, W) in [0, 1], in batches; image i starts from the noise of `seed + i`.

    Args:
        pipeline: Pipeline of a student, or stock pipeline of a known family, from `load_pipeline`.
        prompts: A prompt for each image.
        nfe: Number of steps.
        seed: Seed of the first image.
        height: Height in pixels; None means the training size of the autoencoder.
        width: Width in pixels; None means the training size of the autoencoder.
        guidance_scale: Guidance scale: an input if the transformer embeds it, otherwise the scale of two-branch guidance.
        arguments: Arguments that a stock export of a student is called with; its guidance is built in. None: no such export.
        grid_scale: Enlargement of a grid of all images, which the memory has to suffice for as well; None for no grid.

    Raises:
        ConfigurationError: If the image size does not fit the family or the memory, a student has its guidance built in, or a
            word-level tokenizer does not know a word.
    """
    if isinstance(pipeline, PreTrainedModel):
        yield from _generate_hunyuan_image3(pipeline, prompts, nfe, seed, height, width, guidance_scale, grid_scale)
        return
    family = few_step(pipeline)
    for prompt in dict.fromkeys(prompts):
        check_words(family, prompt)
    settings: dict[str, Any] = {**_checked_size(family, height, width), "num_inference_steps": nfe, "output_type": "pt"}
    check_memory(family, len(prompts), settings["height"], settings["width"], grid_scale)
    # By default stock pipelines pad prompts to a fixed length, which may differ from the length in training.
    settings |= stock_options(type(pipeline), family.sequence_length) | dict(arguments or {})
    draws_globally = not is_student(pipeline) and bool(pipeline.scheduler.config.get("stochastic_sampling"))
    for batch, seeds in _batches(prompts, seed, 1 if draws_globally else BATCH_SIZE):
        guidance = guidance_arguments(pipeline, guidance_scale, len(batch), arguments is not None)
        generators = [torch.Generator().manual_seed(each) for each in seeds]
        with _global_seed(seeds[0], pipeline.device) if draws_globally else nullcontext():
            yield pipeline(prompt=batch, generator=generators, **settings, **guidance).images.float().cpu()


def _generate_hunyuan_image3(
    student: Any,
    prompts: Sequence[str],
    nfe: int,
    seed: int,
    height: int | None,
    width: int | None,
    guidance_scale: float | None,
    grid_scale: int | None,
) -> Iterator[Tensor]:
    """Generate images with a student of HunyuanImage 3.0, which is not a diffusers pipeline."""
    if not student.embeds_guidance and guidance_scale not in (None, 1):
        raise _guidance_is_built_in(guidance_scale)
    settings: dict[str, Any] = {"num_inference_steps": nfe, "guidance_scale": guidance_scale, "output_type": "pt"}
    settings |= _checked_size(student, height, width)
    check_memory(student, len(prompts), settings["height"], settings["width"], grid_scale)
    for batch, seeds in _batches(prompts, seed, BATCH_SIZE):
        generators = [torch.Generator().manual_seed(each) for each in seeds]
        yield student.sample_images(batch, generator=generators, **settings).float().cpu()


def _checked_size(family: Any, height: int | None, width: int | None) -> dict[str, int]:
    height, width = height or family.default_size, width or family.default_size
    try:
        family.latent_shape(height, width)
    except ValueError as error:
        raise ConfigurationError(f"--height {height} and --width {width}: {error}") from error
    return {"height": height, "width": width}


def check_memory(family: Any, count: int, height: int, width: int, grid_scale: int | None = None) -> None:
    """Check that images of a size can fit into memory at all, before the sampling starts.

    This is a lower bound: the last feature map of the autoencoder's decoder, twice, and the grid of images, if any. Sampling
    may need more.

    Args:
        family: Pipeline with an autoencoder.
        count: Number of images.
        height: Height of an image in pixels.
        width: Width of an image in pixels.
        grid_scale: Factor of the grid's enlargement; None for no grid.

    Raises:
        ConfigurationError: If the images need more memory than the device, or the machine for the grid, has.
    """
    device = family.vae.device
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    decoder_total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else total
    channels = min(family.vae.config.get("block_out_channels") or [3])
    decoding = 2 * min(count, BATCH_SIZE) * channels * height * width * family.vae.dtype.itemsize
    parts = [(decoding, decoder_total, "set smaller ones, or give fewer prompts")]
    if grid_scale is not None:  # float32 images, and two copies of the 8-bit grid
        grid = 3 * count * height * width * (4 + 2 * grid_scale**2)
        parts.append((grid, total, f"set smaller ones, a smaller --scale than {grid_scale}, or --out to a directory"))
    for needed, available, remedy in parts:
        if needed > available:
            raise ConfigurationError(
                f"--height {height} and --width {width}: {count} images of this size need at least {needed / 2**30:.0f} GiB of "
                f"memory, and there are {available / 2**30:.0f} GiB; {remedy}"
            )


def _batches(prompts: Sequence[str], seed: int, size: int) -> Iterator[tuple[list[str], list[int]]]:
    """Batches of prompts, each with its seed."""
    for start in range(0, len(prompts), size):
        batch = list(prompts[start : start + size])
        yield batch, [seed + start + i for i in range(len(batch))]


@contextmanager
def _global_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generator, from which stock schedulers take fresh noise, by a number derived from an image's seed.

    The seed itself would give the values of the initial noise again.
    """
    derived = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derived)
        yield


def few_step(pipeline: DiffusionPipeline) -> FewStepPipeline:
    """Pipeline of a student unchanged, or the few-step pipeline of a teacher's family with the teacher's components."""
    if is_student(pipeline):
        student: FewStepPipeline = pipeline
        return student
    return FAMILIES[type(pipeline).__name__](**pipeline.components)


def guidance_arguments(
    pipeline: DiffusionPipeline, guidance_scale: float | None, batch_size: int, is_distilled: bool = False
) -> dict[str, Any]:
    """Arguments of a pipeline call for guidance: an embedded scale, two-branch guidance, or none for most students.

    Args:
        pipeline: Pipeline of a student or a teacher.
        guidance_scale: The scale; None takes the default.
        batch_size: Number of prompts.
        is_distilled: Whether a stock pipeline is a student's, whose own arguments are its defaults.
    """
    embeds_guidance = bool(pipeline.transformer.config.get("guidance_embeds", False))
    if (is_student(pipeline) or is_distilled) and not embeds_guidance:
        if guidance_scale is None or guidance_scale == 1:
            return {}
        raise _guidance_is_built_in(guidance_scale)
    if is_distilled and guidance_scale is None:
        return {}
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
