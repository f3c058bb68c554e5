"""Write generated images: a grid in one PNG file, or a directory with one file an image."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.outputs import atomic_file, check_directory, check_file, directory_contents

GAP = 2
"""White pixels between the images of a grid, before enlargement."""
METADATA = "metadata.jsonl"
"""Table in a directory of images: file name, prompt and seed of each."""


def check_output(out: Path) -> bool:
    """Check that images can be written.

    Returns:
        Whether the output is a directory, not the PNG file of a grid.

    Raises:
        ConfigurationError: If the output has another ending than .png, cannot be written, or is a directory with files.
    """
    if out.suffix.lower() == ".png" and not out.is_dir():
        check_file(out, "--out")
        return False
    if out.suffix and not out.is_dir():
        raise ConfigurationError(f"--out is {str(out)!r}; set it to a file name that ends in .png, or to a directory")
    check_directory(out, "--out")
    if out.is_dir() and directory_contents(out):
        raise ConfigurationError(f"--out is {str(out)!r}, which has files; choose another directory, or empty it")
    return True


def write_grid(images: Tensor, file: Path, scale: int = 1, columns: int | None = None) -> None:
    """Write images (B, 3, H, W) in [0, 1] to one PNG file, as a grid.

    Args:
        images: The images, row by row.
        file: PNG file to write.
        scale: Factor of a nearest-neighbor enlargement.
        columns: Number of columns; None gives an approximately square grid.
    """
    count, _, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = torch.ones(3, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    for i, image in enumerate(images):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        grid[:, top : top + height, left : left + width] = image
    with atomic_file(file) as output:
        _save(grid, output, scale)


def write_directory(
    batches: Iterable[Tensor], directory: Path, scale: int, prompts: Sequence[str], images_per_prompt: int, seed: int
) -> int:
    """Write each image to a file named by the index of its prompt and its index among those of the prompt, as they come.

    Args:
        batches: Images (B, 3, H, W) in [0, 1], those of the first prompt first.
        directory: Directory; created if it does not exist.
        scale: Factor of a nearest-neighbor enlargement.
        prompts: The prompts.
        images_per_prompt: Number of images of each prompt.
        seed: Seed of the first image.

    Returns:
        Number of images.
    """
    rows: list[str] = []
    for image in (each for batch in batches for each in batch):
        prompt, i = divmod(len(rows), images_per_prompt)
        name = f"{prompt:05}-{i:03}.png"
        with atomic_file(directory / name) as output:
            _save(image, output, scale)
        rows.append(json.dumps({"file_name": name, "prompt": prompts[prompt], "seed": seed + len(rows)}) + "\n")
    with atomic_file(directory / METADATA) as output:
        output.write("".join(rows).encode())
    return len(rows)


def _save(image: Tensor, output: BinaryIO, scale: int) -> None:
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(output, format="png")
