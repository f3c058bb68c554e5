import itertools
import random

import pytest
import torch

from lightning_distill.data.shapes import (
    BACKGROUNDS,
    BOXES,
    CATEGORIES,
    COLORS,
    DEFAULT_COLORS,
    GAP,
    IMAGE_SIZE,
    LATTICE,
    MARGIN,
    RADII,
    SHAPES,
    WORDS,
    Prompt,
    Scene,
    SceneObject,
    category_prompts,
    coverage,
    is_held_out,
    parse_prompt,
    prompts,
    render,
    sample_scene,
    signed_distance,
)

ALL = [prompt for category in CATEGORIES for prompt in category_prompts(category)]


def scenes(category: str, number: int = 300) -> list[tuple[Prompt, Scene]]:
    rng = random.Random(0)
    chosen = [rng.choice(category_prompts(category)) for _ in range(number)]
    return [(prompt, sample_scene(prompt, rng)) for prompt in chosen]


def box(item: SceneObject) -> tuple[float, float, float, float]:
    side, up, down = (extent * item.radius for extent in BOXES[item.shape])
    return item.x - side, item.y - up, item.x + side, item.y + down


def test_captions_are_unique_and_round_trip() -> None:
    assert len({prompt.text for prompt in ALL}) == len(ALL)
    assert [parse_prompt(prompt.text) for prompt in ALL] == ALL


def test_captions_use_all_words_and_have_at_most_seven() -> None:
    words = [prompt.text.split() for prompt in ALL]
    assert max(len(caption) for caption in words) == 7
    assert set(itertools.chain(*words)) == set(WORDS)
    assert len(set(WORDS)) == len(WORDS)


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("a circle", "single_object"),
        ("a circle and a cross", "two_object"),
        ("three crosses", "counting"),
        ("a red circle", "colors"),
        ("a circle left of a cross", "position"),
        ("a red circle and a red cross", None),
        ("a red circle and a blue cross", "color_attr"),
        ("five circles", None),
        ("A circle", None),
    ],
)
def test_grammar(text: str, category: str | None) -> None:
    if category:
        assert parse_prompt(text).category == category
    else:
        with pytest.raises(ValueError, match="is not in the Shapes grammar; write one like"):
            parse_prompt(text)


def test_unknown_names_raise() -> None:
    with pytest.raises(ValueError, match="category 'colours' is unknown; choose one of single_object"):
        category_prompts("colours")
    with pytest.raises(ValueError, match="shape 'star' is unknown; choose one of circle"):
        signed_distance("star", torch.zeros(1), torch.zeros(1), 1.0)


def test_held_out_compositions() -> None:
    training, held_out = prompts(held_out=False), prompts(held_out=True)
    assert set(training) == set(CATEGORIES)
    assert set(held_out) == {"position", "color_attr"}
    for category in CATEGORIES:
        assert set(training[category]).isdisjoint(held_out.get(category, []))
        assert set(training[category]) | set(held_out.get(category, [])) == set(category_prompts(category))
    share = sum(map(len, held_out.values())) / sum(len(category_prompts(category)) for category in held_out)
    assert 0.08 < share < 0.17
    assert all(is_held_out(prompt) for prompt in itertools.chain(*held_out.values()))


def test_training_has_all_words_and_color_shape_pairs() -> None:
    training = list(itertools.chain(*prompts(held_out=False).values()))
    assert {word for prompt in training for word in prompt.text.split()} == set(WORDS)
    pairs = {pair for prompt in training for pair in zip(prompt.colors, prompt.shapes, strict=True)}
    assert set(itertools.product(COLORS, SHAPES)) <= pairs
    # The held-out list must not change between versions; otherwise results are not comparable.
    assert is_held_out(parse_prompt(prompts(held_out=True)["position"][0].text))
    assert len(prompts(held_out=True)["position"]) == 6
    assert len(prompts(held_out=True)["color_attr"]) == 38


@pytest.mark.parametrize("category", CATEGORIES)
def test_scenes_match_their_prompts(category: str) -> None:
    for prompt, scene in scenes(category):
        assert tuple(item.shape for item in scene.objects) == prompt.shapes
        assert all(named in (None, item.color) for named, item in zip(prompt.colors, scene.objects, strict=True))
        assert {item.radius for item in scene.objects} <= set(RADII.values())
        assert scene.background in BACKGROUNDS
        if category == "counting":
            assert len({(item.color, item.radius) for item in scene.objects}) == 1


@pytest.mark.parametrize("category", CATEGORIES)
def test_objects_are_inside_and_separated(category: str) -> None:
    for _, scene in scenes(category):
        boxes = [box(item) for item in scene.objects]
        assert all(min(b) >= 0.5 and max(b) <= IMAGE_SIZE - 0.5 for b in boxes)
        assert all(min(o.x, o.y) >= MARGIN and o.x % LATTICE == o.y % LATTICE == 0 for o in scene.objects)
        for a, b in itertools.combinations(boxes, 2):
            assert max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= GAP


@pytest.mark.parametrize(("relation", "x", "y"), [("left of", -1, 0), ("right of", 1, 0), ("above", 0, -1), ("below", 0, 1)])
def test_relations_hold(relation: str, x: int, y: int) -> None:
    related = [(prompt, scene) for prompt, scene in scenes("position", 600) if prompt.relation == relation]
    assert len(related) > 100
    for _, scene in related:
        first, second = scene.objects
        dx, dy = first.x - second.x, first.y - second.y
        assert dx * x + dy * y > abs(dx * y) + abs(dy * x)


def test_unspecified_attributes_vary() -> None:
    sampled = [sample_scene(parse_prompt("a circle"), random.Random(seed)) for seed in range(300)]
    assert {scene.background for scene in sampled} == set(BACKGROUNDS)
    assert {scene.objects[0].radius for scene in sampled} == set(RADII.values())
    assert len({(scene.objects[0].x, scene.objects[0].y) for scene in sampled}) == 9


def test_colors_are_named_or_default() -> None:
    assert set(DEFAULT_COLORS) == set(SHAPES)
    assert len(set(DEFAULT_COLORS.values())) == len(SHAPES)
    for category in CATEGORIES:
        for prompt, scene in scenes(category):
            for shape, named, item in zip(prompt.shapes, prompt.colors, scene.objects, strict=True):
                assert item.color == (named or DEFAULT_COLORS[shape])


def test_scenes_are_deterministic() -> None:
    for prompt in ALL[::7]:
        first, second = (sample_scene(prompt, random.Random("3-5")) for _ in range(2))
        assert first == second
        torch.testing.assert_close(render([first]), render([second]), rtol=0, atol=0)
    assert len({sample_scene(parse_prompt("a circle"), random.Random(f"3-{i}")) for i in range(8)}) > 1


def test_rendering_does_not_depend_on_the_batch() -> None:
    batch = [scene for category in CATEGORIES for _, scene in scenes(category, 5)]
    torch.testing.assert_close(render(batch), torch.cat([render([scene]) for scene in batch]), rtol=0, atol=0)


@pytest.mark.parametrize("radius", RADII.values())
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_nearly_equal_areas_within_their_boxes(shape: str, radius: float) -> None:
    fine = torch.arange(-10, 10, 0.05) + 0.025
    inside = signed_distance(shape, fine, fine[:, None], radius) < 0
    assert 0.75 < inside.sum() * 0.05**2 / (torch.pi * radius**2) < 1.1
    side, up, down = (extent * radius for extent in BOXES[shape])
    rows, columns = fine[inside.any(1)], fine[inside.any(0)]
    assert columns.max() == pytest.approx(side, abs=0.1)
    assert columns.min() == pytest.approx(-side, abs=0.1)
    assert rows.max() == pytest.approx(down, abs=0.1)
    assert rows.min() == pytest.approx(-up, abs=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_antialiased_and_centered(shape: str) -> None:
    grid = torch.arange(IMAGE_SIZE) + 0.5
    cover = coverage(shape, grid - 16, grid[:, None] - 16, RADII["large"])
    assert cover.min() == 0
    assert cover.max() == 1
    assert ((cover > 0) & (cover < 1)).any()
    torch.testing.assert_close(cover, cover.flip(1))
    centroid = (cover.sum(0) @ grid / cover.sum(), cover.sum(1) @ grid / cover.sum())
    assert centroid == pytest.approx((16, 16), abs=0.15)


def test_chroma_is_coverage_on_a_neutral_background() -> None:
    item = SceneObject("square", "magenta", 16.0, 12.0, RADII["large"])
    for background in BACKGROUNDS:
        image = render([Scene((item,), background)])[0]
        assert image.dtype == torch.uint8
        assert image[:, 12, 16].tolist() == [255, 0, 255]
        outside = image[:, 24:]
        assert outside.unique().tolist() == [round(background * 255)]
        grid = torch.arange(IMAGE_SIZE) + 0.5
        chroma = (image.float().amax(0) - image.float().amin(0)) / 255
        torch.testing.assert_close(chroma, coverage("square", grid - 16, grid[:, None] - 12, item.radius), rtol=0, atol=0.01)
