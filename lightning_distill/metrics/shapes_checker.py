"""The exact check of a Shapes picture against its prompt.

A picture is read back into the scene it shows: find the objects, explain each as one shape of a legal size, draw the scene
that this gives and compare. Whatever the drawing does not explain is a flaw: a ragged border, a faded object, a ghost of
another picture, a smudge. Only a picture without a flaw is held against its prompt, as GenEval (arXiv 2310.11513) does with
an object detector in place of `read_scene`.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from lightning_distill.data.shapes import COLORS, IMAGE_SIZE, RADII, RELATIONS, SHAPES, Prompt, Scene, SceneObject, coverage

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

REASONS = ("background", "quality", "stray", "count", "shape", "color", "position")
"""Why a picture fails, in the order of the checks: the first three are flaws of the picture, the others miss the prompt."""

FOREGROUND = 0.45
"""Chroma, which is an object's coverage of a pixel, from which a pixel belongs to it."""
LEAST_AREA = 9
"""Pixels an object has at least; less is no object, and a stray if it shows. The smallest true one has 36."""
SIZE_TOLERANCE = (0.95, 1.0, 1.05)
"""Radii tried around each legal one. In between the two legal sizes lies what an average of both looks like."""
OBJECT_ERROR = 0.045
"""Greatest squared error of an object, as a share of the squared contrast of its drawing. A quarter cut off costs 0.2."""
SHAPE_MARGIN = 0.5
"""Greatest error of the best shape, as a share of that of the next one: an object halfway between two shapes is neither."""
OBJECT_PATCH_ERROR = 0.3
"""Greatest root mean squared error of a 3 x 3 patch of an object, in any channel: no hole and no bite, be it small."""
BACKGROUND_CHROMA = 0.08
"""Greatest chroma of the background."""
BACKGROUND_ERROR = 0.06
"""Greatest root mean squared error of the background outside the objects."""
STRAY_ERROR = 0.1
"""Greatest error of a 3 x 3 mean outside the objects, in any channel."""

_PALETTE: Array = np.array(list(COLORS.values()), dtype=np.float32)
_BITS = (_PALETTE > 0.5) @ np.array([4, 2, 1])
_HUE_OF_BITS = np.array([list(_BITS).index(code) if code in _BITS else -1 for code in range(8)])
_SQUARE = np.ones((3, 3), dtype=bool)
_IN_PLANE = np.stack([0 * _SQUARE, _SQUARE, 0 * _SQUARE])
_GRID: Array = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
_TRIED_RADII = torch.tensor([radius * factor for radius in RADII.values() for factor in SIZE_TOLERANCE])


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows its prompt; if not, `reason` is one of `REASONS`, otherwise empty."""

    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class Reading:
    """The scene a picture shows, None if a `flaw` ("background", "quality" or "stray") keeps it from being one."""

    scene: Scene | None
    flaw: str = ""


def check(image: Tensor, prompt: Prompt) -> Verdict:
    """Check a picture against its prompt.

    Args:
        image: (3, 32, 32) in [0, 1].
        prompt: What it should show.

    Raises:
        ValueError: If the picture has another shape.
    """
    reading = read_scene(image)
    reason = reading.flaw if reading.scene is None else compare(reading.scene, prompt)
    return Verdict(not reason, reason)


def compare(scene: Scene, prompt: Prompt) -> str:
    """Hold a scene against a prompt; what the prompt leaves open may be anything.

    Returns:
        "count", "shape", "color" or "position", or nothing if the prompt holds.
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
    return "" if any(_related(order, prompt.relation) for order in orders) else "position"


def read_scene(image: Tensor) -> Reading:
    """Find the scene a picture shows, the inverse of `data.shapes.render`.

    Args:
        image: (3, 32, 32) in [0, 1].

    Raises:
        ValueError: If the picture has another shape.
    """
    if tuple(image.shape) != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"a Shapes picture is (3, {IMAGE_SIZE}, {IMAGE_SIZE}), not {tuple(image.shape)}; check one at a time")
    picture: Array = image.detach().to("cpu", torch.float32).clamp(0, 1).numpy()
    if not np.isfinite(picture).all():
        return Reading(None, "background")
    low = picture.min(0)
    chroma = picture.max(0) - low

    plain = ~ndimage.binary_dilation(chroma > FOREGROUND, iterations=2)
    if plain.sum() < IMAGE_SIZE**2 / 4:
        return Reading(None, "background")
    background = np.median(picture[:, plain], axis=1)
    if np.ptp(background) > BACKGROUND_CHROMA:
        return Reading(None, "background")
    level = float(background.mean())

    found = _explain(picture, _components(picture, low, chroma), level)
    if found is None:
        return Reading(None, "quality")
    objects, covers = found
    flaw = _flaw(picture, objects, covers, level)
    return Reading(None, flaw) if flaw else Reading(Scene(objects, level))


def _components(picture: Array, low: Array, chroma: Array) -> list[tuple[int, Mask]]:
    """Connected components of one color each: index of the color and mask (32, 32)."""
    above = picture > low + 0.5 * chroma
    hue = _HUE_OF_BITS[4 * above[0] + 2 * above[1] + above[2]]
    planes = (hue == np.arange(len(COLORS))[:, None, None]) & (chroma > FOREGROUND)
    labels, count = ndimage.label(planes, structure=_IN_PLANE)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    places = ndimage.find_objects(labels)
    kept = [i for i in range(1, count + 1) if areas[i] >= LEAST_AREA]
    return [(places[i - 1][0].start, labels[places[i - 1][0].start] == i) for i in kept]


def _explain(picture: Array, components: list[tuple[int, Mask]], level: float) -> tuple[tuple[SceneObject, ...], Array] | None:
    """The objects that explain the components, with the coverage (N, 32, 32) of each, or None where that is hopeless."""
    if not components:
        return (), np.zeros((0, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    names = list(COLORS)
    colors = [color for color, _ in components]
    masks = np.stack([mask for _, mask in components])
    contrast = _PALETTE[colors] - level
    # The projection on the color's contrast is the coverage; unlike the chroma it is unbiased under noise.
    alpha = np.einsum("nc,chw->nhw", contrast, picture - level) / np.square(contrast).sum(1)[:, None, None]
    # Antialiasing reaches a pixel beyond the mask; what lies further may be the fringe of a neighbor.
    near = np.stack([ndimage.binary_dilation(mask, structure=_SQUARE) for mask in masks])
    fits = _fit(alpha * (near & ~(masks.any(0) & ~masks)))
    if fits is None:
        return None
    objects = [
        SceneObject(shape, names[color], x, y, radius) for color, (shape, x, y, radius, _) in zip(colors, fits, strict=True)
    ]
    return tuple(objects), np.stack([cover for *_, cover in fits])


Fit = tuple[str, float, float, float, Array]
"""Shape, x, y, radius and coverage (32, 32) of an object."""


def _fit(alpha: Array) -> list[Fit] | None:
    """The shape of legal size closest to each coverage (N, 32, 32), None if one is between two shapes.

    Every shape has its centroid at 0, so that an object's is where its centre must be.
    """
    positive = alpha.clip(0, 1)
    mass = positive.sum((1, 2))
    x = positive.sum(1) @ _GRID / mass
    y = positive.sum(2) @ _GRID / mass
    # A window of 19 pixels holds the largest shape; padding lets it hang over the border.
    half = 9
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    padded = np.pad(alpha, ((0, 0), (half, half), (half, half)))
    span = np.arange(2 * half + 1)
    rows, columns = top[:, None] + span, left[:, None] + span
    window = torch.from_numpy(padded[np.arange(len(alpha))[:, None, None], rows[:, :, None], columns[:, None, :]])
    dx = torch.from_numpy((columns - half + 0.5 - x[:, None]).astype(np.float32))[:, None, None, :]
    dy = torch.from_numpy((rows - half + 0.5 - y[:, None]).astype(np.float32))[:, None, :, None]
    tried = torch.stack([coverage(shape, dx, dy, _TRIED_RADII[:, None, None]) for shape in SHAPES], dim=1)
    error = (tried - window[:, None, None]).square().sum((-1, -2)) / tried.square().sum((-1, -2))
    best = error.flatten(1).argmin(1).tolist()
    first, second = error.amin(2).sort(1).values[:, :2].unbind(1)
    if (first > SHAPE_MARGIN * second).any():
        return None
    fits = []
    for i, choice in enumerate(best):
        shape, radius = SHAPES[choice // len(_TRIED_RADII)], float(_TRIED_RADII[choice % len(_TRIED_RADII)])
        fits.append(_place(shape, float(x[i]), float(y[i]), radius))
    return fits


def _place(shape: str, x: float, y: float, radius: float) -> Fit:
    grid = torch.from_numpy(_GRID)
    return shape, x, y, radius, coverage(shape, grid - x, grid[:, None] - y, radius).numpy()


def _flaw(picture: Array, objects: tuple[SceneObject, ...], covers: Array, level: float) -> str:
    """What the drawing of the objects leaves unexplained: "background", "quality", "stray" or nothing."""
    contrast = np.array([COLORS[item.color] for item in objects], dtype=np.float32).reshape(-1, 3) - level
    drawn = np.clip(level + np.einsum("nc,nhw->chw", contrast, covers), 0, 1)
    error = picture - drawn
    zones = [ndimage.binary_dilation(cover > 0, structure=_SQUARE) for cover in covers]
    if objects:
        patches = np.sqrt(ndimage.uniform_filter(np.square(error), size=(1, 3, 3), mode="constant").clip(0)).max(0)
        squared = np.square(error).sum(0)
        for zone, cover, difference in zip(zones, covers, contrast, strict=True):
            share = squared[zone].sum() / (np.square(cover).sum() * np.square(difference).sum())
            if share > OBJECT_ERROR or patches[zone].max() > OBJECT_PATCH_ERROR:
                return "quality"
    outside = ~np.logical_or.reduce([np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool), *zones])
    smooth = ndimage.uniform_filter(error * outside, size=(1, 3, 3), mode="constant")
    if np.abs(smooth).max() > STRAY_ERROR:
        return "stray"
    return "background" if np.sqrt(np.square(error[:, outside]).mean()) > BACKGROUND_ERROR else ""


def _related(objects: tuple[SceneObject, ...], relation: str | None) -> bool:
    if relation is None:
        return True
    first, second = objects
    along_x, along_y = RELATIONS[relation]
    dx, dy = first.x - second.x, first.y - second.y
    along, across = (dx * along_x, dy) if along_x else (dy * along_y, dx)
    return along > abs(across)
