"""The demo scenes: drawing, captions, and the checker that reads a picture back."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vipo.demo.scenes import (
    BACKGROUNDS,
    COLORS,
    IMAGE_SIZE,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    CaptionParts,
    Scene,
    SceneObject,
    caption,
    draw,
    is_held_out,
    object_mask,
    one_object_captions,
    outline_distance,
    sample_scene,
    scene_metadata,
    two_object_captions,
)
from vipo.demo.seen import border_color, check, foreground, read_scenes

ALL_WORDS = CaptionParts()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_scene(rng) for _ in range(500)]


def _pictures(scenes: list[Scene]) -> torch.Tensor:
    return torch.from_numpy(np.stack([draw(scene) for scene in scenes]))


def _share_right(drawn: list[Scene], claimed: list[Scene]) -> float:
    seen = read_scenes(_pictures(drawn))
    right = [
        all(check(picture, scene_metadata(scene, ALL_WORDS)).values())
        for picture, scene in zip(seen, claimed, strict=True)
    ]
    return sum(right) / len(right)


def _one_object(shape: str = "circle", color: str = "red", background: str = "white", radius: float = 10.0) -> Scene:
    return Scene((SceneObject(shape, color, "small", "in the middle", 0.0, 0.0, radius),), background)


def _other(word: str, words: list[str]) -> str:
    return words[(words.index(word) + 1) % len(words)]


def _changed(scene: Scene, attribute: str) -> Scene:
    """The scene with one attribute of its first object (or its background, or its number of objects) changed."""
    first, *rest = scene.objects
    if attribute == "background":
        return replace(scene, background=_other(scene.background, list(BACKGROUNDS)))
    if attribute == "count":
        # One more where there is one, in the corner farthest from it; one fewer where there are two.
        corner = [math.copysign(IMAGE_SIZE / 2 - 9.0, -value if value else 1.0) for value in (first.x, first.y)]
        added = replace(first, size="small", position="", x=corner[0], y=corner[1], radius=6.0)
        return replace(scene, objects=(first,) if rest else (first, added))
    if attribute == "color":
        first = replace(first, color=_other(first.color, list(COLORS)))
    elif attribute == "shape":
        first = replace(first, shape=_other(first.shape, list(SHAPES)))
    elif attribute == "size":
        size = _other(first.size, list(SIZES))
        radius = sum(SIZES[size]) / 2
        limit = IMAGE_SIZE / 2 - radius - 1.0
        x, y = (float(np.clip(value, -limit, limit)) for value in (first.x, first.y))
        first = replace(first, size=size, radius=radius, x=x, y=y)
    elif attribute == "position":
        position = _other(first.position, list(POSITIONS))
        first = replace(first, position=position, x=POSITIONS[position][0], y=POSITIONS[position][1])
    else:
        raise ValueError(attribute)
    return replace(scene, objects=(first, *rest))


def test_checker_reads_clean_drawings(scenes: list[Scene]) -> None:
    assert _share_right(scenes, scenes) >= 0.99


@pytest.mark.parametrize("attribute", ["color", "shape", "background", "count", "size", "position"])
def test_checker_sees_one_changed_attribute(scenes: list[Scene], attribute: str) -> None:
    # The bar is 50 %; clean drawings leave no excuse for missing more than one in twenty.
    subjects = [scene for scene in scenes if attribute not in ("size", "position") or scene.relation is None]
    assert len(subjects) > 400
    assert _share_right([_changed(scene, attribute) for scene in subjects], subjects) < 0.05


def test_checker_sees_swapped_objects(scenes: list[Scene]) -> None:
    pairs = [scene for scene in scenes if scene.relation is not None]
    assert len(pairs) > 40
    swapped = []
    for scene in pairs:
        one, two = scene.objects
        swapped.append(replace(scene, objects=(replace(one, x=two.x, y=two.y), replace(two, x=one.x, y=one.y))))
    assert _share_right(swapped, pairs) < 0.05


def test_checker_blames_the_changed_attribute_alone() -> None:
    scene = _one_object()
    claim = scene_metadata(scene, ALL_WORDS)
    for kind in ("color", "shape", "size", "background", "count"):
        seen = read_scenes(_pictures([_changed(scene, kind)]))[0]
        assert [name for name, holds in check(seen, claim).items() if not holds] == [kind]


def test_empty_picture_holds_no_claim_but_its_background() -> None:
    scene = _one_object(background="mint")
    empty = torch.from_numpy(draw(Scene((), "mint")))[None]
    result = check(read_scenes(empty)[0], scene_metadata(scene, ALL_WORDS))
    assert [kind for kind, holds in result.items() if holds] == ["background"]
    assert not foreground(empty).any()


def test_checker_refuses_another_size() -> None:
    with pytest.raises(ValueError, match=r"images: expected shape \(B, 3, 64, 64\), got \(1, 3, 32, 64\)"):
        read_scenes(torch.zeros(1, 3, 32, 64))


@pytest.mark.parametrize(
    ("shape", "area"), [("circle", math.pi * 144), ("square", (1.8 * 12) ** 2), ("triangle", 2 * 144)]
)
def test_drawn_area_is_the_shape_s(shape: str, area: float) -> None:
    item = SceneObject(shape, "red", "small", "in the middle", 1.3, -2.7, 12.0)
    assert object_mask(item).sum() == pytest.approx(area, rel=0.02)


def test_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="'star' is not one of circle, square, triangle"):
        outline_distance("star", np.zeros(1), np.zeros(1), 1.0)


def test_picture_is_the_palette_inside_and_outside() -> None:
    image = draw(_one_object("square", "green", "black"))
    assert image.shape == (3, IMAGE_SIZE, IMAGE_SIZE)
    assert image.dtype == np.float32
    assert image[:, 32, 32] == pytest.approx(COLORS["green"])
    assert image[:, 0, 0] == pytest.approx(BACKGROUNDS["black"])


def test_foreground_is_the_drawn_object(scenes: list[Scene]) -> None:
    masks = foreground(_pictures(scenes)).numpy()
    for scene, mask in zip(scenes, masks, strict=True):
        coverage = sum(object_mask(item) for item in scene.objects)
        assert np.all(mask[coverage > 0.99])
        assert not np.any(mask[coverage < 0.01])


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 3), (4, 9), (5, 5), (16, 7)])
def test_border_color_is_the_lower_median_of_the_two_outermost_rings(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    ring = torch.ones(size, dtype=torch.bool)
    ring[2:-2, 2:-2] = False
    assert torch.equal(border_color(images), images[..., ring].median(dim=-1).values)


def test_border_color_ignores_a_minority_of_the_border() -> None:
    image = torch.full((1, 3, 16, 16), 0.5)
    image[..., :, :6] = 1.0
    assert torch.equal(border_color(image), torch.full((1, 3), 0.5))


def test_sampled_scenes_fit_the_picture_and_their_words(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert len(scene.objects) == (1 if scene.relation is None else 2)
        for item in scene.objects:
            low, high = SIZES[item.size]
            assert low <= item.radius <= high
            assert max(abs(item.x), abs(item.y)) + item.radius <= IMAGE_SIZE / 2 - 1.0 + 1e-9
        if scene.relation is not None:
            assert scene.objects[0].color != scene.objects[1].color
    share = sum(scene.relation is not None for scene in scenes) / len(scenes)
    assert abs(share - 0.15) < 4 * math.sqrt(0.15 * 0.85 / len(scenes))


@pytest.mark.parametrize("flags", list(itertools.product((True, False), repeat=3)))
def test_captions_and_metadata_name_the_same_words(scenes: list[Scene], flags: tuple[bool, bool, bool]) -> None:
    parts = CaptionParts(*flags)
    for scene in scenes[:60]:
        text, claim = caption(scene, parts), scene_metadata(scene, parts)
        assert text.endswith(f" on a {scene.background} background")
        assert claim["background"] == scene.background
        subject = text.removesuffix(f" on a {scene.background} background")
        for key, words in (("color", COLORS), ("size", SIZES), ("position", POSITIONS), ("shape", SHAPES)):
            claimed = {item[key] for item in claim["objects"] if key in item}
            assert claimed == {word for word in words if f" {word} " in f" {subject} "}
        assert claim.get("relation") == scene.relation


def test_two_object_captions_are_all_there_and_distinct() -> None:
    captions = dict(two_object_captions())
    pairs = len(SHAPES) ** 2 * len(COLORS) * (len(COLORS) - 1)
    assert len(captions) == len(list(two_object_captions())) == pairs * len(RELATIONS) * len(BACKGROUNDS)
    for text, claim in captions.items():
        first, second = (f"a {item['color']} {item['shape']}" for item in claim["objects"])
        assert text == f"{first} {claim['relation']} {second} on a {claim['background']} background"


def test_one_object_captions_are_all_there_and_distinct() -> None:
    named, colourless = dict(one_object_captions(True)), dict(one_object_captions(False))
    words = len(SHAPES) * (len(SIZES) + 1) * (len(POSITIONS) + 1) * len(BACKGROUNDS)
    assert len(list(one_object_captions(False))) == len(colourless) == words
    assert len(list(one_object_captions(True))) == len(named) == words * len(COLORS)
    assert not any(color in text.split() for color in COLORS for text in colourless)
    assert not any("color" in item for claim in colourless.values() for item in claim["objects"])
    assert set(named).isdisjoint(colourless)


def test_one_caption_in_eight_is_held_out() -> None:
    held = [is_held_out(text) for text, _ in one_object_captions(True)]
    assert abs(sum(held) / len(held) - 1 / 8) < 4 * math.sqrt(7 / 64 / len(held))
