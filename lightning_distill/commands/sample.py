"""`lightning-distill sample`: generate images with a pipeline directory."""

import argparse
import json
import math
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

import lightning_distill.students
from lightning_distill.commands import PROGRAM
from lightning_distill.errors import ConfigurationError
from lightning_distill.outputs import atomic_file, check_file
from lightning_distill.paths import expand_path
from lightning_distill.students.few_step import FewStepPipeline, unwrap_tokenizer
from lightning_distill.students.lora_student import SETTINGS, load_lora_student
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.families import FAMILIES, stock_options
from lightning_distill.teachers.hunyuan_image3.directory import is_hunyuan_image3, published_class, read_config
from lightning_distill.teachers.hunyuan_image3.directory import is_student as is_student_config
from lightning_distill.teachers.registry import SHIPPED, resolve_pretrained
from lightning_distill.teachers.shipped import has_shared_components, load_shipped_student

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OWN_CODE = Path(lightning_distill.students.__file__).parent
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
    arguments.out = Path(expand_path(str(arguments.out), "--out"))
    arguments.pipeline = expand_path(arguments.pipeline, "--pipeline")
    if arguments.base is not None:
        arguments.base = expand_path(arguments.base, "--base")
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
    if arguments.out.suffix.lower() != ".png":
        raise ConfigurationError(f"--out is {str(arguments.out)!r}; set it to a file name that ends in .png")
    check_file(arguments.out, "--out")
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    dtype = DTYPES[arguments.torch_dtype]
    pipeline = load_pipeline(arguments.pipeline, arguments.trust_remote_code, dtype, arguments.base)
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
    )
    write_grid(images, arguments.out, arguments.scale)
    print(f"wrote {arguments.out}")


def build_parser(name: str = "sample") -> argparse.ArgumentParser:
    """Parser of the arguments."""
    parser = argparse.ArgumentParser(f"{PROGRAM} {name}", description="Generate images with a pipeline directory.")
    known = f"directory of an exported student or of a stock pipeline of a known family, or {', '.join(SHIPPED)}"
    parser.add_argument("--pipeline", required=True, help=known)
    parser.add_argument("--base", help="base of a student exported without it: directory or hub id (default: its teacher)")
    parser.add_argument("--prompt", action="append", required=True, help="several prompts give a grid of images")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
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


def load_pipeline(
    name: str, trust_remote_code: bool = False, torch_dtype: torch.dtype = torch.float32, base: str | None = None
) -> DiffusionPipeline | PreTrainedModel:
    """Load a pipeline or a student of HunyuanImage 3.0, to the GPU if there is one.

    Args:
        name: Shipped name or directory.
        trust_remote_code: Whether to run Python files in the directory that are not of this package.
        torch_dtype: dtype of the weights.
        base: Base of a LoRA student that was exported without it: shipped name, directory or hub id; None means its teacher.

    Raises:
        ConfigurationError: If there is no pipeline of a known family, it has untrusted code, or its base is missing.
    """
    directory = Path(resolve_pretrained(name))
    if (directory / SETTINGS).is_file():
        return _on_base(name, directory, base, torch_dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    if base is not None:
        raise ConfigurationError(f"--base is {base!r}, but --pipeline {name!r} is a complete pipeline; leave --base out")
    config = read_config(directory)
    is_pipeline = (directory / "model_index.json").is_file()
    if not is_pipeline and not is_hunyuan_image3(config):
        raise ConfigurationError(
            f"--pipeline is {name!r}, which has no model_index.json; choose a pipeline directory or one of {', '.join(SHIPPED)}"
        )
    if not is_pipeline and not is_student_config(config):
        raise ConfigurationError(
            f"--pipeline is {name!r}, HunyuanImage 3.0 itself; sample by its generate_image, or choose an exported student"
        )
    if is_pipeline:
        _check_json(name, directory / "model_index.json")
    if not trust_remote_code and (foreign := foreign_code(directory)):
        raise ConfigurationError(
            f"--pipeline {name!r} brings code of its own ({', '.join(foreign)}); read it, and add --trust_remote_code to run it"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not is_pipeline:
        # `AutoModelForCausalLM` would confuse different directories of the same name within one process.
        kind: Any = published_class(directory)
        model = kind.from_pretrained(directory, dtype=torch_dtype, use_safetensors=True)
        model.load_tokenizer(str(directory))
        return model.eval().to(device)
    try:
        if has_shared_components(directory):
            pipeline = load_shipped_student(name, torch_dtype)
        else:
            pipeline = DiffusionPipeline.from_pretrained(
                directory, torch_dtype=torch_dtype, use_safetensors=True, trust_remote_code=True
            )
    except OSError as error:  # a component is missing or unreadable
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"--pipeline {name!r} cannot be loaded ({reason}); export or download it again") from error
    if not is_student(pipeline) and type(pipeline).__name__ not in FAMILIES:
        raise ConfigurationError(
            f"--pipeline {name!r} is a {type(pipeline).__name__}; choose an exported student, or one of {', '.join(FAMILIES)}"
        )
    return pipeline.to(device)


def _check_json(name: str, file: Path) -> None:
    try:
        json.loads(file.read_text())
    except ValueError as error:
        raise ConfigurationError(
            f"--pipeline {name!r} has a {file.name} that cannot be read ({error}); export or download it again"
        ) from error


def _on_base(name: str, directory: Path, base: str | None, torch_dtype: torch.dtype) -> DiffusionPipeline:
    """Load a LoRA student on its base with the code of this package. Code in the directory is not run."""
    settings = json.loads((directory / SETTINGS).read_text())
    kind = settings["pipeline"][1]
    if kind not in {family.__name__ for family in FAMILIES.values()}:
        raise ConfigurationError(
            f"--pipeline {name!r} has the pipeline class {kind}, which this version does not know; update lightning-distill"
        )
    base, _, revision = (base or settings["base_model"]).partition("@")
    try:
        DiffusersAdapter(base, revision=revision or None).check()
        stock = DiffusionPipeline.from_pretrained(
            resolve_pretrained(base), revision=revision or None, torch_dtype=torch_dtype, use_safetensors=True
        )
    except (ConfigurationError, OSError) as error:
        reason = " ".join(str(error).split()).removeprefix("adapter.pretrained is ")
        raise ConfigurationError(
            f"--pipeline {name!r} has only the LoRA weights of a student, whose base cannot be loaded ({reason}); set --base "
            "to the directory or hub id of its base"
        ) from error
    try:
        return load_lora_student(stock, directory)
    except ValueError as error:
        raise ConfigurationError(f"--pipeline {name!r} does not fit the base {base!r}: {error}") from error


def is_own_code(file: Path) -> bool:
    """Whether a file in a pipeline directory equals the file that this package exports, byte for byte."""
    own = OWN_CODE / file.name
    return own.is_file() and own.read_bytes() == file.read_bytes()


def foreign_code(directory: Path) -> list[str]:
    """Code that a trusted load could run besides this package's: files in the directory, and references to other places."""
    files = {file for pattern in ("*.py", "*/*.py", "**/*.py") for file in directory.glob(pattern)}
    foreign = [str(file.relative_to(directory)) for file in sorted(files) if not is_own_code(file)]
    # A plain module name refers to a file in the directory. Paths and other repositories refer to unchecked code.
    return foreign + [each for each in _code_references(directory) if not all(part.isidentifier() for part in each.split("."))]


def _code_references(directory: Path) -> Iterator[str]:
    """References to modules and classes in the index of a pipeline and the configs of its components."""
    index = directory / "model_index.json"
    for references in json.loads(index.read_text()).values() if index.is_file() else ():
        if isinstance(references, list):
            yield from (reference for reference in references if isinstance(reference, str))
    for file in sorted(directory.glob("**/*.json")):
        if '"auto_map"' in (text := file.read_text(errors="replace")):
            yield from _auto_maps(json.loads(text))


def _auto_maps(value: Any, inside: bool = False) -> Iterator[str]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _auto_maps(each, inside or name == "auto_map")
    elif isinstance(value, list):
        for each in value:
            yield from _auto_maps(each, inside)
    elif inside and isinstance(value, str):
        yield value


def sample(
    pipeline: DiffusionPipeline | PreTrainedModel,
    prompts: Sequence[str],
    *,
    nfe: int,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    guidance_scale: float | None = None,
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

    Raises:
        ConfigurationError: If the image size does not fit, a student has its guidance built in, or a word-level tokenizer does
            not know a word.
    """
    if isinstance(pipeline, PreTrainedModel):
        return _sample_hunyuan_image3(pipeline, prompts, nfe, seed, height, width, guidance_scale)
    family = few_step(pipeline)
    for prompt in prompts:
        check_words(family, prompt)
    settings = {**_checked_size(family, height, width), "num_inference_steps": nfe, "output_type": "pt"}
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
) -> Tensor:
    """Generate images with a student of HunyuanImage 3.0, which is not a diffusers pipeline."""
    if not student.embeds_guidance and guidance_scale not in (None, 1):
        raise _guidance_is_built_in(guidance_scale)
    settings = {"num_inference_steps": nfe, "guidance_scale": guidance_scale, "output_type": "pt"}
    settings |= _checked_size(student, height, width)
    images = [student.sample_images(batch, generator=generators, **settings) for batch, generators in _batches(prompts, seed)]
    return torch.cat([each.float().cpu() for each in images])


def _checked_size(family: Any, height: int | None, width: int | None) -> dict[str, int]:
    height, width = height or family.default_size, width or family.default_size
    try:
        family.latent_shape(height, width)
    except ValueError as error:
        raise ConfigurationError(f"--height {height} and --width {width}: {error}") from error
    return {"height": height, "width": width}


def _batches(prompts: Sequence[str], seed: int) -> Iterator[tuple[list[str], list[torch.Generator]]]:
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = list(prompts[start : start + BATCH_SIZE])
        yield batch, [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]


def is_student(pipeline: DiffusionPipeline) -> bool:
    """Whether a pipeline is a student's. Its class may come from its directory, so `isinstance` does not apply."""
    return hasattr(type(pipeline), "stock_class")


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
