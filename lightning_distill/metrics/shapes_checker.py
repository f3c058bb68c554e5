"""Exact check of a Shapes image against its prompt.

The checker reconstructs the scene of an image. It finds the objects and fits a shape of a valid size to each one. It then
renders the fitted scene and compares the rendering with the image. Any difference above the thresholds is a flaw: a ragged
border, a faded object, a ghost of another image, a smudge. Only an image without flaws is compared with its prompt. GenEval
(arXiv 2310.11513) does the same with an object detector in place of `read_scene`.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_distill.data.shapes import COLORS, IMAGE_SIZE, RADII, RELATIONS, SHAPES, Prompt, Scene, SceneObject, coverage

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

REASONS = ("background", "quality", "stray", "count", "shape", "color", "position")
"""Failure reasons in the order of the checks. The first three are flaws of the image, the others are prompt mismatches."""

FOREGROUND = 0.45
"""Chroma threshold of object pixels; the chroma of a pixel is its coverage by an object."""
MIN_AREA = 9
"""Minimum area of an object in pixels. A smaller visible area is a stray. The smallest true object has 36 pixels."""
SIZE_TOLERANCE = (0.95, 1.0, 1.05)
"""Tested factors of each valid radius. A radius between the two valid sizes is typical of a mean of both sizes."""
OBJECT_ERROR = 0.045
"""Maximum squared error of an object relative to its squared rendered contrast. A missing quarter has an error of 0.2."""
SHAPE_MARGIN = 0.5
"""Maximum error of the best shape relative to the second best: an object halfway between two shapes is neither."""
OBJECT_PATCH_ERROR = 0.3
"""Maximum root mean squared error of a 3 x 3 object patch in any channel. It rejects holes and notches, even small ones."""
BACKGROUND_CHROMA = 0.08
"""Maximum chroma of the background."""
BACKGROUND_ERROR = 0.06
"""Maximum root mean squared error of the background outside the objects."""
STRAY_ERROR = 0.1
"""Maximum error of a 3 x 3 mean outside the objects, in any channel."""

_PALETTE: Array = np.array(list(COLORS.values()), dtype=np.float32)
_BITS = (_PALETTE > 0.5) @ np.array([4, 2, 1])
_HUE_OF_BITS = np.array([list(_BITS).index(code) if code in _BITS else -1 for code in range(8)])
_SQUARE = np.ones((3, 3), dtype=bool)
_IN_PLANE = np.stack([0 * _SQUARE, _SQUARE, 0 * _SQUARE])
_GRID: Array = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
_CANDIDATE_RADII = torch.tensor([radius * factor for radius in RADII.values() for factor in SIZE_TOLERANCE])


@dataclass(frozen=True)
class Verdict:
    """Result of a check. `reason` is one of `REASONS` if the image does not match its prompt, and empty otherwise."""

    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class Reading:
    """Reconstructed scene of an image, or None with a `flaw`: "background", "quality" or "stray"."""

    scene: Scene | None
    flaw: str = ""


def check(image: Tensor, prompt: Prompt) -> Verdict:
    """Check an image against its prompt.

    Args:
        image: Image (3, 32, 32) in [0, 1].
        prompt: Prompt of the image.

    Raises:
        ValueError: If the image has another shape.
    """
    reading = read_scene(image)
    reason = reading.flaw if reading.scene is None else compare(reading.scene, prompt)
    return Verdict(not reason, reason)


def compare(scene: Scene, prompt: Prompt) -> str:
    """Compare a scene with a prompt; attributes that the prompt does not specify may have any value.

    Returns:
        Mismatch "count", "shape", "color" or "position", or an empty string if the scene matches the prompt.
    """
    if len(scene.objects) != len(prompt.shapes):
        return "count"
    orders = list(itertools.permutations(scene.objects))
    orders = [order for order in orders if all(item.shape == shape for item, shape in zip(order, prompt.shapes, strict=True))]
    if not orders:
        return "shape"
    orders = [order for order in orders if all(c in (None, item.color) for item, c in zip(order, prompt.colors, strict=True))]
    if not orders:
        return "color"
    return "" if any(_satisfies_relation(order, prompt.relation) for order in orders) else "position"


def read_scene(image: Tensor) -> Reading:
    """Reconstruct the scene of an image, the inverse of `data.shapes.render`.

    Args:
        image: Image (3, 32, 32) in [0, 1].

    Raises:
        ValueError: If the image has another shape.
    """
    from scipy import ndimage

    if tuple(image.shape) != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"a Shapes image is (3, {IMAGE_SIZE}, {IMAGE_SIZE}), not {tuple(image.shape)}; check one at a time")
    pixels: Array = image.detach().to("cpu", torch.float32).clamp(0, 1).numpy()
    if not np.isfinite(pixels).all():
        return Reading(None, "background")
    low = pixels.min(0)
    chroma = pixels.max(0) - low

    plain = ~ndimage.binary_dilation(chroma > FOREGROUND, iterations=2)
    if plain.sum() < IMAGE_SIZE**2 / 4:
        return Reading(None, "background")
    background = np.median(pixels[:, plain], axis=1)
    if np.ptp(background) > BACKGROUND_CHROMA:
        return Reading(None, "background")
    level = float(background.mean())

    fitted = _fit_objects(pixels, _components(pixels, low, chroma), level)
    if fitted is None:
        return Reading(None, "quality")
    objects, coverages = fitted
    flaw = _find_flaw(pixels, objects, coverages, level)
    return Reading(None, flaw) if flaw else Reading(Scene(objects, level))


def _components(pixels: Array, low: Array, chroma: Array) -> list[tuple[int, Mask]]:
    """Connected components of a single color: color index and mask (32, 32)."""
    from scipy import ndimage

    above = pixels > low + 0.5 * chroma
    hue = _HUE_OF_BITS[4 * above[0] + 2 * above[1] + above[2]]
    planes = (hue == np.arange(len(COLORS))[:, None, None]) & (chroma > FOREGROUND)
    labels, count = ndimage.label(planes, structure=_IN_PLANE)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    slices = ndimage.find_objects(labels)
    large = [i for i in range(1, count + 1) if areas[i] >= MIN_AREA]
    return [(slices[i - 1][0].start, labels[slices[i - 1][0].start] == i) for i in large]


def _fit_objects(
    pixels: Array, components: list[tuple[int, Mask]], level: float
) -> tuple[tuple[SceneObject, ...], Array] | None:
    """Fit an object to each component; returns N objects and their coverages (N, 32, 32), or None if a fit is ambiguous."""
    from scipy import ndimage

    if not components:
        return (), np.zeros((0, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    names = list(COLORS)
    colors = [color for color, _ in components]
    masks = np.stack([mask for _, mask in components])
    contrast = _PALETTE[colors] - level
    # The projection onto the color contrast is the coverage; unlike the chroma, it is unbiased under noise.
    alpha = np.einsum("nc,chw->nhw", contrast, pixels - level) / np.square(contrast).sum(1)[:, None, None]
    # Antialiasing extends one pixel beyond the mask; pixels farther away may belong to the border of a neighbor.
    near = np.stack([ndimage.binary_dilation(mask, structure=_SQUARE) for mask in masks])
    fits = _fit_shapes(alpha * (near & ~(masks.any(0) & ~masks)))
    if fits is None:
        return None
    objects = [
        SceneObject(shape, names[color], x, y, radius) for color, (shape, x, y, radius, _) in zip(colors, fits, strict=True)
    ]
    return tuple(objects), np.stack([shape_coverage for *_, shape_coverage in fits])


Fit = tuple[str, float, float, float, Array]
"""Shape, x, y, radius and coverage (32, 32) of an object."""


def _fit_shapes(alpha: Array) -> list[Fit] | None:
    """Fit the closest shape of a valid size to each coverage (N, 32, 32); None if an object is between two shapes.

    Every shape has its centroid at 0, so the centroid of an object is its center.
    """
    positive = alpha.clip(0, 1)
    mass = positive.sum((1, 2))
    x = positive.sum(1) @ _GRID / mass
    y = positive.sum(2) @ _GRID / mass
    # A window of 19 pixels contains the largest shape; padding allows windows beyond the image border.
    half = 9
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    padded = np.pad(alpha, ((0, 0), (half, half), (half, half)))
    span = np.arange(2 * half + 1)
    rows, columns = top[:, None] + span, left[:, None] + span
    window = torch.from_numpy(padded[np.arange(len(alpha))[:, None, None], rows[:, :, None], columns[:, None, :]])
    dx = torch.from_numpy((columns - half + 0.5 - x[:, None]).astype(np.float32))[:, None, None, :]
    dy = torch.from_numpy((rows - half + 0.5 - y[:, None]).astype(np.float32))[:, None, :, None]
    candidates = torch.stack([coverage(shape, dx, dy, _CANDIDATE_RADII[:, None, None]) for shape in SHAPES], dim=1)
    error = (candidates - window[:, None, None]).square().sum((-1, -2)) / candidates.square().sum((-1, -2))
    best = error.flatten(1).argmin(1).tolist()
    first, second = error.amin(2).sort(1).values[:, :2].unbind(1)
    if (first > SHAPE_MARGIN * second).any():
        return None
    fits = []
    for i, choice in enumerate(best):
        shape, radius = SHAPES[choice // len(_CANDIDATE_RADII)], float(_CANDIDATE_RADII[choice % len(_CANDIDATE_RADII)])
        fits.append(_render_fit(shape, float(x[i]), float(y[i]), radius))
    return fits


def _render_fit(shape: str, x: float, y: float, radius: float) -> Fit:
    grid = torch.from_numpy(_GRID)
    return shape, x, y, radius, coverage(shape, grid - x, grid[:, None] - y, radius).numpy()


def _find_flaw(pixels: Array, objects: tuple[SceneObject, ...], coverages: Array, level: float) -> str:
    """First flaw of an image relative to its fitted scene: "background", "quality", "stray", or an empty string."""
    from scipy import ndimage

    contrast = np.array([COLORS[item.color] for item in objects], dtype=np.float32).reshape(-1, 3) - level
    rendered = np.clip(level + np.einsum("nc,nhw->chw", contrast, coverages), 0, 1)
    error = pixels - rendered
    zones = [ndimage.binary_dilation(alpha > 0, structure=_SQUARE) for alpha in coverages]
    if objects:
        patches = np.sqrt(ndimage.uniform_filter(np.square(error), size=(1, 3, 3), mode="constant").clip(0)).max(0)
        squared = np.square(error).sum(0)
        for zone, alpha, difference in zip(zones, coverages, contrast, strict=True):
            share = squared[zone].sum() / (np.square(alpha).sum() * np.square(difference).sum())
            if share > OBJECT_ERROR or patches[zone].max() > OBJECT_PATCH_ERROR:
                return "quality"
    outside = ~np.logical_or.reduce([np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool), *zones])
    smooth = ndimage.uniform_filter(error * outside, size=(1, 3, 3), mode="constant")
    if np.abs(smooth).max() > STRAY_ERROR:
        return "stray"
    return "background" if np.sqrt(np.square(error[:, outside]).mean()) > BACKGROUND_ERROR else ""


def _satisfies_relation(objects: tuple[SceneObject, ...], relation: str | None) -> bool:
    if relation is None:
        return True
    first, second = objects
    along_x, along_y = RELATIONS[relation]
    dx, dy = first.x - second.x, first.y - second.y
    along, across = (dx * along_x, dy) if along_x else (dy * along_y, dx)
    return along > abs(across)
