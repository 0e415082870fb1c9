"""Procedural scenes: what the demo generator paints, its captions, and an automatic checker.

A scene is one or two flat shapes on a flat background, drawn with antialiased signed distances.
Captions name the shape and the background always, the colour, size and position sometimes.
The checker reads a picture back into a scene by comparison with its border colour; it shares
nothing with the drawing code but the palette and the shapes' outlines.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage

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

# Halfway between the two sizes' radii, and half of the off-centre displacement that large objects can have.
_SIZE_BOUNDARY = 13.0
_OFF_CENTRE = 5.5
_FOREGROUND_DISTANCE = 0.25
_MIN_OBJECT_PIXELS = 30
_MIN_SHAPE_IOU = 0.75


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


@dataclass(frozen=True)
class SeenObject:
    """What the checker read off one connected region. `shape` is None where no outline fits."""

    shape: str | None
    color: str
    size: str
    position: str
    x: float
    y: float
    pixels: int


@dataclass(frozen=True)
class SeenScene:
    """What the checker read off one picture; objects from the largest to the smallest."""

    objects: tuple[SeenObject, ...]
    background: str


def border_color(images: torch.Tensor) -> torch.Tensor:
    """Median colour of the two outermost pixel rings: ``(B, 3, H, W)`` to ``(B, 3)``."""
    bottom, right = (max(2, side - 2) for side in images.shape[-2:])
    between = images[..., 2:bottom, :]
    parts = (images[..., :2, :], images[..., bottom:, :], between[..., :2], between[..., right:])
    ring = torch.cat([part.flatten(-2) for part in parts], dim=-1)
    # Not `median`, which has no deterministic kernel on CUDA.
    return ring.sort(dim=-1).values[..., (ring.shape[-1] - 1) // 2]


def foreground(images: torch.Tensor) -> torch.Tensor:
    """Pixels whose colour is far (Euclidean distance above 0.25) from the border's: ``(B, H, W)`` bool."""
    distance: torch.Tensor = (images - border_color(images)[..., None, None]).norm(dim=-3)
    return distance.gt(_FOREGROUND_DISTANCE)


def object_coverage(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Share of each cell of a `size` grid that the foreground covers: ``(B, 3, H, W)`` to ``(B, *size)`` in [0, 1].

    The oracle map: where a reward that reads the object's own pixels looks.
    """
    return F.adaptive_avg_pool2d(foreground(images).float(), size)


def read_scenes(images: torch.Tensor) -> list[SeenScene]:
    """Read pictures ``(B, 3, 64, 64)`` in [0, 1] back into scenes."""
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"images: expected shape (B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), got {tuple(images.shape)}")
    images = images.detach().float().cpu()
    masks, borders = foreground(images).numpy(), border_color(images).numpy()
    return [
        SeenScene(_seen_objects(image, mask), _nearest(border, BACKGROUNDS))
        for image, mask, border in zip(images.numpy(), masks, borders, strict=True)
    ]


def _nearest(color: NDArray[np.float32], palette: Mapping[str, tuple[float, float, float]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(color - np.array(palette[name]))))


def _seen_objects(image: NDArray[np.float32], mask: NDArray[np.bool_]) -> tuple[SeenObject, ...]:
    labels, count = ndimage.label(mask)
    seen = []
    for label in range(1, count + 1):
        region = labels == label
        pixels = int(region.sum())
        if pixels < _MIN_OBJECT_PIXELS:
            continue
        rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        x = (columns[0] + columns[-1] + 1 - IMAGE_SIZE) / 2
        y = (rows[0] + rows[-1] + 1 - IMAGE_SIZE) / 2
        # The inside only: antialiased edges mix in the background.
        inside = ndimage.binary_erosion(region)
        color = _nearest(np.median(image[:, inside if inside.any() else region], axis=1), COLORS)
        shape = _fitted_shape(region, x, y, max(height, width) / 2)
        size = "small" if max(height, width) / 2 < _SIZE_BOUNDARY else "large"
        seen.append(SeenObject(shape, color, size, _position(x, y), float(x), float(y), pixels))
    return tuple(sorted(seen, key=lambda item: -item.pixels))


def _position(x: float, y: float) -> str:
    if max(abs(x), abs(y)) < _OFF_CENTRE:
        return "in the middle"
    if abs(x) > abs(y):
        return "on the left" if x < 0 else "on the right"
    return "at the top" if y < 0 else "at the bottom"


def _fitted_shape(region: NDArray[np.bool_], x: float, y: float, half: float) -> str | None:
    axis = np.arange(IMAGE_SIZE, dtype=np.float64) + 0.5 - IMAGE_SIZE / 2
    overlaps = {}
    for shape in SHAPES:
        radius = half / 0.9 if shape == "square" else half
        template = outline_distance(shape, axis[None, :] - x, axis[:, None] - y, radius) <= 0
        overlaps[shape] = float((template & region).sum() / (template | region).sum())
    best = max(overlaps, key=lambda name: overlaps[name])
    return best if overlaps[best] >= _MIN_SHAPE_IOU else None


def check(seen: SeenScene, claim: Mapping[str, Any]) -> dict[str, bool]:
    """Which claims of a caption's metadata hold in a picture.

    Returns:
        One entry per kind of claim (`background`, `count`, `shape`, and `color`, `size`, `position`,
        `relation` where named), true if it holds for every object. Objects that are missing make
        their claims false.
    """
    wanted: Sequence[Mapping[str, Any]] = claim["objects"]
    found = seen.objects[: len(wanted)]
    if len(wanted) == 2 and len(found) == 2:
        along = "x" if claim.get("relation") == "left of" else "y"
        found = tuple(sorted(found, key=lambda item: getattr(item, along)))
    result = {
        "background": seen.background == claim["background"],
        "count": len(seen.objects) == len(wanted),
    }
    for kind in ("shape", "color", "size", "position"):
        if any(kind in item for item in wanted):
            result[kind] = len(found) == len(wanted) and all(
                getattr(have, kind) == want[kind] for have, want in zip(found, wanted, strict=True) if kind in want
            )
    if "relation" in claim:
        along = "x" if claim["relation"] == "left of" else "y"
        result["relation"] = (
            len(found) == 2
            and getattr(found[1], along) - getattr(found[0], along) > 2 * _OFF_CENTRE
            and result["shape"]
            and result.get("color", True)
        )
    return result
