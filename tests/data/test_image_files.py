import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps, PngImagePlugin, features

from lightning_distill.data import image_files
from lightning_distill.data.image_files import ImageDecodeError, read_image, read_size

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n(x) show\n%%EOF\n"


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height: int = 20, width: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(height: int, width: int) -> Image.Image:
    return noise(height // 8, width // 8).resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))


def read(content: bytes, height: int = 8, width: int = 8, **settings: Any) -> torch.Tensor:
    return read_image(io.BytesIO(content), height, width, **settings)


# Resizing


def test_images_are_resized_to_cover_and_center_cropped(tmp_path: Path) -> None:
    pixels = np.zeros((40, 120, 3), dtype=np.uint8)
    pixels[:, 40:80] = 255  # the middle third, which remains after a square crop
    pixels[:, 80:] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", 20, 20)
    assert image.shape == (3, 20, 20)
    assert torch.equal(image[:, :, 1:-1], torch.ones(3, 20, 18))  # the filter blends the border columns with their neighbors
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    assert torch.equal(read_image(tmp_path / "tall.png", 20, 20), image.transpose(1, 2))
    upward = read_image(tmp_path / "wide.png", 80, 240)
    assert upward.shape == (3, 80, 240)
    assert (upward[:, :, :70] == -1).all()
    assert (upward[:, :, 90:150] == 1).all()


def test_downsampling_is_antialiased() -> None:
    checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    image = read(encoded(Image.fromarray(checkerboard), "PNG"))
    assert image.shape == (3, 8, 8)
    assert image.abs().max() < 0.05  # gray; nearest or unfiltered sampling gives black and white


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(("height", "width"), [(900, 700), (901, 1203)])
def test_reduction_before_the_filter_does_not_show(kind: str, height: int, width: int) -> None:
    """Neither the reduced decoding of a JPEG nor that of other formats moves the image, whether or not sizes divide."""
    content = encoded(smooth(height, width), kind, **({"quality": 95} if kind == "JPEG" else {}))
    whole = Image.open(io.BytesIO(content))
    scale = min(height / 40, width / 60)
    left, top = (width - 60 * scale) / 2, (height - 40 * scale) / 2
    box = (left, top, left + 60 * scale, top + 40 * scale)
    expected = np.asarray(whole.resize((60, 40), Image.Resampling.BICUBIC, box=box)).astype(float)
    found = (read(content, 40, 60) + 1) * 127.5
    difference = np.abs(found.permute(1, 2, 0).numpy() - expected)
    assert difference.max() <= 8
    assert difference.mean() < 1


def test_large_images_are_converted_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(smooth(210, 150).convert("P"), "PNG")
    expected = read(content, 10, 10)
    monkeypatch.setattr(image_files, "_STRIP_PIXELS", 1000)
    assert torch.equal(read(content, 10, 10), expected)


# Orientation, transparency, and bits


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_orientation(kind: str) -> None:
    turned = Image.new("RGB", (30, 10), "red")
    turned.paste("blue", (15, 0, 30, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    content = encoded(turned, kind, exif=exif, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {}))
    assert read_size(io.BytesIO(content)) == (30, 10)
    image = read(content, 30, 10)
    assert torch.allclose(image[:, 0, 5], torch.tensor([1.0, -1, -1]), atol=0.05)
    assert torch.allclose(image[:, -1, 5], torch.tensor([-1.0, -1, 1]), atol=0.05)


def oriented(orientation: int, kind: str, place: str) -> bytes:
    """Encode an image of 40 x 80 pixels, whose orientation is in its EXIF or its XMP data."""
    image = smooth(40, 80)
    options: dict[str, Any] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "AVIF": {"quality": 95}}.get(kind, {})
    if kind == "TIFF-LZW":
        kind, options = "TIFF", {"compression": "tiff_lzw"}
    xmp = f'<rdf:Description tiff:Orientation="{orientation}"/>'
    if place == "exif":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    elif kind == "TIFF":
        options["tiffinfo"] = {700: xmp.encode()}
    elif kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp)
    else:
        options["xmp"] = xmp.encode()
    return encoded(image, kind, **options)


@pytest.mark.parametrize("place", ["exif", "xmp"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF", "TIFF-LZW"])
def test_each_orientation_equals_that_of_pillow(kind: str, place: str) -> None:
    """The size in the header and the decoded image agree, for all orientations and formats that have one."""
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this build of Pillow has no AVIF")
    for orientation in range(1, 9):
        content = oriented(orientation, kind, place)
        displayed = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        size = read_size(io.BytesIO(content))
        assert size == (displayed.height, displayed.width) == ((80, 40) if orientation > 4 else (40, 80))
        found = ((read(content, *size) + 1) * 127.5).round().byte().permute(1, 2, 0)
        assert torch.equal(found, torch.from_numpy(np.array(displayed)))
        cropped = read(content, size[0] // 2, size[1] // 2)  # the whole image, whose aspect ratio is that of its size
        assert (cropped - read(encoded(displayed, "PNG"), size[0] // 2, size[1] // 2)).abs().max() < 0.05


def test_orientation_after_the_pixels_of_png_files_is_ignored() -> None:
    """Sizes come from headers, so that the image may not depend on what follows them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(noise(), "PNG", exif=exif)
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    moved = content[:start] + content[end:-12] + content[start:end] + content[-12:]
    assert Image.open(io.BytesIO(moved)).getexif()[0x0112] == 6
    assert read_size(io.BytesIO(content)) == (24, 20)
    assert read_size(io.BytesIO(moved)) == (20, 24)
    assert torch.equal(read(moved, 20, 24), read(encoded(noise(), "PNG"), 20, 24))


def test_wrong_types_in_exif_data_are_ignored() -> None:
    """EXIF data with a text in place of a resolution: the orientation beside it holds."""
    plain = encoded(noise(), "JPEG")
    entries = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + b"\x1a\x01\x02\0\x01\0\0\0abcd"
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + b"\0\0\0\0"
    content = plain[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + plain[2:]
    assert read_size(io.BytesIO(content)) == (24, 20)
    assert read(content).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG", {}),
        (Image.new("RGBA", (99, 99), (0, 0, 0, 0)), "WEBP", {"lossless": True}),
        (Image.new("LA", (8, 8), (0, 0)), "PNG", {}),
        (Image.new("P", (99, 99)), "GIF", {"transparency": 0}),
        (Image.new("L", (8, 8)), "PNG", {"transparency": 0}),
        (Image.fromarray(np.zeros((8, 8), dtype=np.uint16)), "PNG", {"transparency": 0}),
    ],
)
def test_transparent_pixels_are_white(image: Image.Image, kind: str, options: dict[str, Any]) -> None:
    assert (read(encoded(image, kind, **options)) == 1).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_range(kind: str) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16)
    image = read(encoded(Image.fromarray(np.tile(values, (4, 1))), kind), 4, 256)
    assert torch.allclose(image, torch.linspace(-1, 1, 256).expand(3, 4, 256), atol=1e-6)


@pytest.mark.parametrize("values", [np.full((8, 8), 70000, dtype=np.int32), np.ones((8, 8), dtype=np.float32)])
def test_32_bits_a_channel_raise(values: np.ndarray) -> None:
    with pytest.raises(ImageDecodeError, match="32 bits a channel"):
        read(encoded(Image.fromarray(values), "TIFF"))


# Files of others


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", image_files.FORMATS)
def test_damaged_files_are_read_or_raise(kind: str) -> None:
    """Each format with random damages: no exception but `ImageDecodeError`, in one line."""
    assert read(encoded(noise(), kind)).shape == (3, 8, 8)
    generator = np.random.default_rng(0)
    original = encoded(noise(), kind)
    read_files, reasons = 0, []
    for _ in range(60):
        content = bytearray(original)
        for position in generator.integers(0, min(len(content), 400), 3):
            content[position] = generator.integers(0, 256)
        content = content[: generator.integers(1, 2 * len(content))]
        for function in (read_size, lambda file: read_image(file, 8, 8, max_pixels=10**6)):
            try:
                function(io.BytesIO(content))
                read_files += 1
            except ImageDecodeError as error:
                reasons.append(str(error))
    assert read_files
    assert reasons
    assert all(reason and "\n" not in reason for reason in reasons)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged, or not in a format of PNG, JPEG, WEBP"),
        (POSTSCRIPT, "damaged, or not in a format of"),
        (b"DDS " + bytes(200), "damaged, or not in a format of"),
        (encoded(noise(), "PNG")[:500], "truncated"),
        (encoded(noise(), "AVIF").replace(b"iloc", b"free", 1), "Invalid image grid|Failed|failed|[Mm]issing"),
    ],
)
def test_unreadable_files_raise(content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "image.jpg").write_bytes(content)
    for source in (tmp_path / "image.jpg", io.BytesIO(content)):
        with pytest.raises(ImageDecodeError, match=message):
            read_image(source, 8, 8)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (
        ("pipe.png", "not a regular file"),
        ("absent.png", "No such file or directory"),
        (".", "not a regular"),
    ):
        for function in (read_size, lambda path: read_image(path, 8, 8)):
            with pytest.raises(ImageDecodeError, match=reason):
                function(tmp_path / name)


def test_number_of_pixels_is_limited(recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    content = encoded(Image.new("1", (20_000, 10_000)), "PNG")
    assert read_size(io.BytesIO(content)) == (10_000, 20_000)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", lambda _: pytest.fail("pixels were decoded"))
    with pytest.raises(ImageDecodeError, match=r"20000 x 10000 pixels are more than data\.max_pixels 67108864"):
        read(content)
    monkeypatch.undo()
    assert read(encoded(noise(), "PNG"), max_pixels=480).shape == (3, 8, 8)
    with pytest.raises(ImageDecodeError, match=r"24 x 20 pixels are more than data\.max_pixels 479"):
        read(encoded(noise(), "PNG"), max_pixels=479)
    assert limit == Image.MAX_IMAGE_PIXELS
    assert not recwarn.list


def test_jpeg_counts_as_its_decoder_reduces_it() -> None:
    image = Image.new("RGB", (400, 400))
    assert read(encoded(image, "JPEG"), max_pixels=50 * 50).shape == (3, 8, 8)
    with pytest.raises(ImageDecodeError, match="400 x 400 pixels"):
        read(encoded(image, "JPEG", progressive=True), max_pixels=50 * 50)
