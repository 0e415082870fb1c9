"""Procedural scenes: what the demo generator paints, and its captions.

A scene is one or two flat shapes on a flat background, drawn with antialiased signed distances.
Captions name the shape and the background always, the colour, size and position sometimes.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 64
SHAPES = ("circle", "square", "triangle")
COLORS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.92, 0.15),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.12, 0.25, 0.90),
    "purple": (0.55, 0.15, 0.75),
}
BACKGROUNDS: Mapping[str, tuple[float, float, float]] = {
    "white": (0.96, 0.96, 0.96),
    "gray": (0.55, 0.55, 0.55),
    "black": (0.06, 0.06, 0.06),
    "mint": (0.70, 0.93, 0.80),
}
SIZES: Mapping[str, tuple[float, float]] = {"small": (9.0, 11.0), "large": (15.0, 18.0)}
POSITIONS: Mapping[str, tuple[float, float]] = {
    "in the middle": (0.0, 0.0),
    "on the left": (-13.0, 0.0),
    "on the right": (13.0, 0.0),
    "at the top": (0.0, -13.0),
    "at the bottom": (0.0, 13.0),
}
RELATIONS = ("left of", "above")


@dataclass(frozen=True)
class SceneObject:
    """One shape. `x`, `y` (pixels from the image's centre) and `radius` (pixels) place it; words name it."""

    shape: str
    color: str
    size: str
    position: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background; `relation` tells how the first lies to the second."""

    objects: tuple[SceneObject, ...]
    background: str
    relation: str | None = None


@dataclass(frozen=True)
class CaptionParts:
    """Which optional words a caption names."""

    color: bool = True
    size: bool = True
    position: bool = True


def outline_distance(shape: str, x: NDArray[np.float64], y: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """Signed distance (pixels, negative inside) of points to a shape centred at the origin; y points down."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    if shape == "triangle":
        return np.maximum((2.0 * np.abs(x) - (y + radius)) / math.sqrt(5.0), y - radius)
    raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")


def sample_scene(rng: np.random.Generator, two_objects: float = 0.15) -> Scene:
    """A random scene; with probability `two_objects` it holds two small objects in a relation."""
    background = str(rng.choice(list(BACKGROUNDS)))
    if rng.random() < two_objects:
        relation = str(rng.choice(RELATIONS))
        step = (-15.0, 0.0) if relation == "left of" else (0.0, -15.0)
        shapes, colors = rng.choice(SHAPES, size=2), rng.choice(list(COLORS), size=2, replace=False)
        objects = tuple(
            _placed(rng, str(shapes[i]), str(colors[i]), "small", "", sign * step[0], sign * step[1])
            for i, sign in enumerate((1.0, -1.0))
        )
        return Scene(objects, background, relation)
    position = str(rng.choice(list(POSITIONS)))
    dx, dy = POSITIONS[position]
    shape, color, size = (str(rng.choice(list(words))) for words in (SHAPES, COLORS, SIZES))
    return Scene((_placed(rng, shape, color, size, position, dx, dy),), background)


def _placed(
    rng: np.random.Generator, shape: str, color: str, size: str, position: str, dx: float, dy: float
) -> SceneObject:
    radius = float(rng.uniform(*SIZES[size]))
    limit = IMAGE_SIZE / 2 - radius - 1.0
    x, y = (float(np.clip(centre + rng.uniform(-2.0, 2.0), -limit, limit)) for centre in (dx, dy))
    return SceneObject(shape, color, size, position, x, y, radius)


def draw(scene: Scene) -> NDArray[np.float32]:
    """The picture of a scene: ``(3, 64, 64)`` float32 in [0, 1], edges antialiased over one pixel."""
    image = np.broadcast_to(np.array(BACKGROUNDS[scene.background])[:, None, None], (3, IMAGE_SIZE, IMAGE_SIZE))
    for item in scene.objects:
        coverage = object_mask(item)
        image = image * (1.0 - coverage) + np.array(COLORS[item.color])[:, None, None] * coverage
    return image.astype(np.float32)


def object_mask(item: SceneObject) -> NDArray[np.float64]:
    """Coverage of each pixel by the object, ``(64, 64)`` in [0, 1]: the oracle map of the demo scenes."""
    axis = np.arange(IMAGE_SIZE, dtype=np.float64) + 0.5 - IMAGE_SIZE / 2
    x, y = axis[None, :] - item.x, axis[:, None] - item.y
    return np.clip(0.5 - outline_distance(item.shape, x, y, item.radius), 0.0, 1.0)


def caption(scene: Scene, parts: CaptionParts) -> str:
    """The caption of a scene with the optional words that `parts` asks for."""
    names = [
        " ".join(
            [
                "a",
                *([item.size] if parts.size and scene.relation is None else []),
                *([item.color] if parts.color else []),
                item.shape,
            ]
        )
        for item in scene.objects
    ]
    if scene.relation is not None:
        subject = f"{names[0]} {scene.relation} {names[1]}"
    elif parts.position:
        subject = f"{names[0]} {scene.objects[0].position}"
    else:
        subject = names[0]
    return f"{subject} on a {scene.background} background"


def scene_metadata(scene: Scene, parts: CaptionParts) -> dict[str, Any]:
    """What the caption claims, for the checker: only the words that it names."""
    return {
        "objects": [
            {
                "shape": item.shape,
                **({"color": item.color} if parts.color else {}),
                **({"size": item.size} if parts.size and scene.relation is None else {}),
                **({"position": item.position} if parts.position and scene.relation is None else {}),
            }
            for item in scene.objects
        ],
        "background": scene.background,
        **({"relation": scene.relation} if scene.relation is not None else {}),
    }


def is_held_out(text: str) -> bool:
    """Whether a caption is kept out of the generator's training (one in eight, by hash)."""
    return hashlib.sha256(text.encode()).digest()[0] % 8 == 0


def one_object_captions(named_color: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every one-object caption with its metadata, with or without the colour named."""
    colors: Sequence[str] = list(COLORS) if named_color else [next(iter(COLORS))]
    for shape, color, size, position, background in itertools.product(
        SHAPES, colors, [None, *SIZES], [None, *POSITIONS], BACKGROUNDS
    ):
        parts = CaptionParts(color=named_color, size=size is not None, position=position is not None)
        item = SceneObject(shape, color, size or "small", position or "in the middle", 0.0, 0.0, 10.0)
        scene = Scene((item,), background)
        yield caption(scene, parts), scene_metadata(scene, parts)


def two_object_captions() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every caption of two objects with its metadata; colours and relation are named."""
    for shapes, colors, relation, background in itertools.product(
        itertools.product(SHAPES, repeat=2), itertools.permutations(COLORS, 2), RELATIONS, BACKGROUNDS
    ):
        pair = zip(shapes, colors, strict=True)
        objects = tuple(SceneObject(shape, color, "small", "", 0.0, 0.0, 10.0) for shape, color in pair)
        scene = Scene(objects, background, relation)
        yield caption(scene, CaptionParts()), scene_metadata(scene, CaptionParts())
