"""Decoding of image files: the one place that opens images of a data set.

Image files come from others. Only regular files in the formats `FORMATS` are opened, the header's number of pixels is checked
before any pixel is decoded, and every exception of a decoder becomes an `ImageDecodeError`.
"""

import contextlib
import functools
import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from lightning_distill.errors import ConfigurationError

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
"""Formats that are decoded, by Pillow's names. Others, such as EPS, would start programs or have seldom tested decoders."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")
"""Lower-case file name endings of these formats."""
MAX_PIXELS = 2**26
"""Default of `max_pixels`: 67 megapixels, which take 256 MiB decoded."""
_REDUCING_GAP = 3
"""An image is reduced by an integer factor while it stays this many times larger than the output; the filter does the rest."""
_STRIP_PIXELS = 2**20
"""Pixels that are converted to RGB at a time: a converted copy of a large image would multiply its memory."""
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How an image is displayed, by its EXIF orientation."""
_QUARTER_TURNS = (5, 6, 7, 8)


class ImageDecodeError(Exception):
    """An image cannot be decoded. The message is the reason, one line without the name of the file."""


class UnreadableImageError(ConfigurationError):
    """A data set has an image that cannot be decoded, or too many of them. The message names it and its place."""


def read_image(source: Path | IO[bytes], height: int, width: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image, apply its orientation, resize it to cover height x width, and center-crop it.

    The orientation is that of EXIF or XMP data in the header; data after the pixels of a PNG file is ignored.

    The filter is antialiased bicubic. Images of more than three times the output size are first reduced by an integer factor,
    JPEG files by their decoder; the result is indistinguishable. Transparent pixels become white. Grey images with 16 bits
    keep their range, from black to white.

    Args:
        source: Path or content of an image file.
        height: Output height in pixels.
        width: Output width in pixels.
        max_pixels: Largest number of pixels to decode. A JPEG file, unless progressive, counts as its decoder reduces it.

    Returns:
        Image (3, height, width), float in [-1, 1].

    Raises:
        ImageDecodeError: If the file is missing, not regular, damaged, of another format, or too large, or has 32 bits a
            channel.
    """
    with _opened(source) as file:
        output = _output_size(file, height, width)
        drafted = None
        # The decoder of a progressive file holds all its coefficients, whatever its output size is.
        if not file.info.get("progressive"):
            drafted = file.draft(None, (_REDUCING_GAP * output[0], _REDUCING_GAP * output[1]))
        if math.prod(file.size) > max_pixels:
            raise ImageDecodeError(f"{file.width} x {file.height} pixels are more than data.max_pixels {max_pixels}")
        file.load()
        output = _output_size(file, height, width)  # Pillow has applied the orientation of a TIFF file, and removed it
        valid = file.size if drafted is None else drafted[1][2:]
        factor = max(1, int(min(valid[0] / output[0], valid[1] / output[1]) / _REDUCING_GAP))
        reduced = _reduced_rgb(file, factor)
        box = _center_box(valid[0] / factor, valid[1] / factor, output)
        image = reduced.resize(output, Image.Resampling.BICUBIC, box=box)
        transposition = _TRANSPOSITIONS.get(_orientation(file))
    if transposition is not None:
        image = image.transpose(transposition)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def read_size(source: Path | IO[bytes]) -> tuple[int, int]:
    """Height and width in pixels of an image as `read_image` sees it, after its orientation. Reads the header only.

    Raises:
        ImageDecodeError: If the file is missing, not regular, or of another format, or its header is damaged.
    """
    with _opened(source) as file:
        tags = getattr(file, "tag_v2", None)
        # Pillow already swaps the size of an open TIFF file for its tag of the orientation, but not for that of XMP data.
        width, height = file.size if tags is None else (tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength])
        return (width, height) if _orientation(file) in _QUARTER_TURNS else (height, width)


@contextlib.contextmanager
def _opened(source: Path | IO[bytes]) -> Iterator[Image.Image]:
    """Open an image, its header decoded; exceptions in the block become `ImageDecodeError`, as those of opening."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(source, Path):
                # Opening a FIFO waits for its writer, and a device may never end.
                if not stat.S_ISREG(source.stat().st_mode):
                    raise ImageDecodeError("not a regular file")
                source = stack.enter_context(source.open("rb"))
            Image.MAX_IMAGE_PIXELS = None  # it would count a JPEG file before its reduction, and warn in two lines
            yield stack.enter_context(Image.open(source, formats=_formats()))
    except ImageDecodeError:
        raise
    except Exception as error:  # decoders raise almost any kind for a damaged file
        raise ImageDecodeError(_reason(error)) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"damaged, or not in a format of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # a build of PIL may lack some


def _orientation(file: Image.Image) -> int:
    """Orientation in the header; 1, as stored, if there is none or the EXIF data is damaged, as viewers do."""
    try:
        # `PngImageFile.getexif` would decode an image of any size to search for EXIF data after its pixels.
        orientation = Image.Image.getexif(file).get(ExifTags.Base.Orientation)
    except Exception:  # the parser raises almost any kind
        return 1
    return orientation if isinstance(orientation, int) else 1


def _output_size(file: Image.Image, height: int, width: int) -> tuple[int, int]:
    """Output (width, height) before orientation."""
    return (height, width) if _orientation(file) in _QUARTER_TURNS else (width, height)


def _center_box(width: float, height: float, output: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centered box (left, top, right, bottom) with the aspect ratio of the output size (width, height)."""
    scale = min(width / output[0], height / output[1])
    crop_width, crop_height = min(width, scale * output[0]), min(height, scale * output[1])
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return left, top, left + crop_width, top + crop_height


def _reduced_rgb(image: Image.Image, factor: int) -> Image.Image:
    """Image in RGB on white, each factor x factor pixels replaced by their mean."""
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // (width * factor)) * factor
    reduced = Image.new("RGB", (math.ceil(width / factor), math.ceil(height / factor)))
    for top in range(0, height, rows):
        strip = _rgb_on_white(image.crop((0, top, width, min(top + rows, height))))
        reduced.paste(strip.reduce(factor), (0, top // factor))
    return reduced


def _rgb_on_white(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_of_16_bits(image).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    """Grey image with 8 bits, scaled from 16 bits; PIL's own conversion would clip."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ImageDecodeError("32 bits a channel, of unknown range; store 8 or 16 bits")
    transparent = image.info.get("transparency")
    if transparent is not None:
        values = np.where(values == transparent, 65535, values)
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
