"""Shapes: a synthetic text-to-image data set, small enough to learn on a laptop and exact enough to check.

Images are 32 x 32 RGB and show one to four geometric objects on a neutral background. The six prompt categories mirror GenEval
(arXiv 2310.11513). Attributes that the caption does not specify (position, size, background) are random. The image distribution
of one prompt therefore has many modes, and the mean of several modes is not a mode. An object without a named color has the
default color of its shape.
"""

import itertools
import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE_SIZE = 32
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "cyan": (0.0, 1.0, 1.0),
    "magenta": (1.0, 0.0, 1.0),
}
SHAPES = ("circle", "square", "triangle", "cross")
DEFAULT_COLORS = {"circle": "red", "square": "blue", "triangle": "green", "cross": "yellow"}
"""Color of an object if the caption does not name one. The checker accepts any color."""
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
WORDS = (
    *("a", "and", "of", "left", "right", "above", "below"),
    *NUMBERS.values(),
    *COLORS,
    *SHAPES,
    *PLURALS.values(),
)

RADII = {"small": 3.7, "large": 5.4}
"""Radius in pixels per size. All shapes of a size have about the area of a circle with this radius."""
BACKGROUNDS = (0.1, 0.6)
"""Gray levels. They are neutral, so the chroma (max - min over RGB) of a pixel is its coverage by objects."""
BOXES = {
    "circle": (1.0, 1.0, 1.0),
    "square": (0.886, 0.886, 0.886),
    "triangle": (1.18, 1.36, 0.68),
    "cross": (1.15, 1.15, 1.15),
}
"""Extents of a shape from its center, in radii: horizontal on either side, upward, downward."""
LATTICE = 8
"""Grid spacing of object centers in pixels, from `MARGIN` to `IMAGE_SIZE - MARGIN`: the corners of image tokens."""
MARGIN = 8
GAP = 1.0
"""Minimum distance in pixels between the bounding boxes of two objects, so that antialiased borders never touch."""


@dataclass(frozen=True)
class Prompt:
    """Checkable specification of a caption.

    Attributes:
        category: One of `CATEGORIES`.
        shapes: Shape of each object.
        colors: Color of each object, None if the caption does not name it.
        relation: Position of the first object relative to the second, a key of `RELATIONS`, or None.
    """

    category: str
    shapes: tuple[str, ...]
    colors: tuple[str | None, ...]
    relation: str | None = None

    @property
    def text(self) -> str:
        """The caption, in lower case without punctuation, at most seven words."""
        if self.category == "counting":
            return f"{NUMBERS[len(self.shapes)]} {PLURALS[self.shapes[0]]}"
        phrases = [
            f"a {color} {shape}" if color else f"a {shape}" for shape, color in zip(self.shapes, self.colors, strict=True)
        ]
        return f" {self.relation or 'and'} ".join(phrases)


@dataclass(frozen=True)
class SceneObject:
    """An object of a scene: `x` (rightward) and `y` (downward) in pixels from the top left corner, `radius` in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Scene description of an image: its objects, and the gray level of its background in [0, 1]."""

    objects: tuple[SceneObject, ...]
    background: float


def category_prompts(category: str) -> list[Prompt]:
    """All prompts of a category, in a fixed order."""
    pairs = list(itertools.permutations(SHAPES, 2))
    if category == "single_object":
        return [Prompt(category, (shape,), (None,)) for shape in SHAPES]
    if category == "two_object":
        return [Prompt(category, pair, (None, None)) for pair in pairs]
    if category == "counting":
        return [Prompt(category, (shape,) * n, (None,) * n) for n in NUMBERS for shape in SHAPES]
    if category == "colors":
        return [Prompt(category, (shape,), (color,)) for shape in SHAPES for color in COLORS]
    if category == "position":
        return [Prompt(category, pair, (None, None), relation) for pair in pairs for relation in RELATIONS]
    if category == "color_attr":
        colors = list(itertools.permutations(COLORS, 2))
        return [Prompt(category, pair, color_pair) for pair in pairs for color_pair in colors]
    raise ValueError(f"category {category!r} is unknown; choose one of {', '.join(CATEGORIES)}")


def is_held_out(prompt: Prompt) -> bool:
    """Whether a prompt is a held-out composition, which never occurs in training.

    About an eighth of `position` and `color_attr` are held-out compositions. Every word occurs in training, and so does every
    pair of color and shape. Only the combination is new.
    """
    return prompt.category in ("position", "color_attr") and zlib.crc32(prompt.text.encode()) % 8 == 0


def prompts(*, held_out: bool) -> dict[str, list[Prompt]]:
    """Training prompts or held-out prompts by category; only two categories have held-out prompts."""
    by_category = {c: [p for p in category_prompts(c) if is_held_out(p) == held_out] for c in CATEGORIES}
    return {category: selected for category, selected in by_category.items() if selected}


def parse_prompt(text: str) -> Prompt:
    """Parse a caption.

    Raises:
        ValueError: If the caption is not in the grammar.
    """
    try:
        return _prompts_by_text()[text]
    except KeyError:
        raise ValueError(
            f"prompt {text!r} is not in the Shapes grammar; write one like 'a red circle and a blue square'"
        ) from None


def sample_scene(prompt: Prompt, rng: random.Random) -> Scene:
    """Sample positions, sizes and background for a prompt. Colors are the named ones, or `DEFAULT_COLORS`."""
    sizes = ["small"] if prompt.category == "counting" else list(RADII)
    radii = [RADII[rng.choice(sizes)] for _ in prompt.shapes]
    colors = [named or DEFAULT_COLORS[shape] for shape, named in zip(prompt.shapes, prompt.colors, strict=True)]
    while True:
        objects = [
            SceneObject(shape, color, _sample_coordinate(rng), _sample_coordinate(rng), radius)
            for shape, color, radius in zip(prompt.shapes, colors, radii, strict=True)
        ]
        if _are_separated(objects) and _satisfies_relation(objects, prompt.relation):
            return Scene(tuple(objects), rng.choice(BACKGROUNDS))


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
    """Signed distance in pixels to the border of a shape centered at 0, negative inside. Shapes have nearly equal areas."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.886 * radius
    if shape == "triangle":
        side = math.sqrt(3) / 2 * x.abs() - 0.5 * y
        return torch.maximum(y, side) - 0.68 * radius
    if shape == "cross":
        long, short = 1.15 * radius, 0.42 * radius
        vertical = torch.maximum(x.abs() - short, y.abs() - long)
        horizontal = torch.maximum(x.abs() - long, y.abs() - short)
        return torch.minimum(vertical, horizontal)
    raise ValueError(f"shape {shape!r} is unknown; choose one of {', '.join(SHAPES)}")


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
    """Coverage of each pixel by a shape, in [0, 1], antialiased over one pixel.

    Args:
        shape: One of `SHAPES`.
        x: Horizontal pixel centers relative to the shape's center, broadcastable with `y` and `radius`.
        y: Vertical pixel centers relative to the shape's center, broadcastable with `x` and `radius`.
        radius: Radius in pixels.
    """
    return (0.5 - signed_distance(shape, x, y, radius)).clamp(0, 1)


def render(scenes: Sequence[Scene]) -> Tensor:
    """Render B scenes.

    Returns:
        Images (B, 3, 32, 32), uint8 in [0, 255].
    """
    grid = torch.arange(IMAGE_SIZE) + 0.5
    background = torch.tensor([scene.background for scene in scenes])[:, None, None, None]
    canvas = background.repeat(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    objects = [(i, item) for i, scene in enumerate(scenes) for item in scene.objects]
    for shape in SHAPES:
        selected = [(i, item) for i, item in objects if item.shape == shape]
        if not selected:
            continue
        index = torch.tensor([i for i, _ in selected])
        position = torch.tensor([(item.x, item.y, item.radius) for _, item in selected])[..., None, None]
        color = torch.tensor([COLORS[item.color] for _, item in selected])[..., None, None]
        alpha = coverage(shape, grid - position[:, 0], grid[:, None] - position[:, 1], position[:, 2])[:, None]
        # Objects never overlap, so the contributions of an image's objects add up.
        canvas.index_add_(0, index, alpha * (color - background[index]))
    return canvas.mul(255).round().to(torch.uint8)


def _sample_coordinate(rng: random.Random) -> float:
    return float(LATTICE * rng.randint(MARGIN // LATTICE, (IMAGE_SIZE - MARGIN) // LATTICE))


def _box(item: SceneObject) -> tuple[float, float, float, float]:
    side, up, down = (extent * item.radius for extent in BOXES[item.shape])
    return item.x - side, item.y - up, item.x + side, item.y + down


def _are_separated(objects: Sequence[SceneObject]) -> bool:
    boxes = [_box(item) for item in objects]
    return all(max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= GAP for a, b in itertools.combinations(boxes, 2))


def _satisfies_relation(objects: Sequence[SceneObject], relation: str | None) -> bool:
    if relation is None:
        return True
    first, second = objects
    dx, dy = first.x - second.x, first.y - second.y
    along_x, along_y = RELATIONS[relation]
    along, across = (dx * along_x, dy) if along_x else (dy * along_y, dx)
    return along > abs(across)


_BY_TEXT: dict[str, Prompt] = {}


def _prompts_by_text() -> dict[str, Prompt]:
    if not _BY_TEXT:
        _BY_TEXT.update({prompt.text: prompt for category in CATEGORIES for prompt in category_prompts(category)})
    return _BY_TEXT
