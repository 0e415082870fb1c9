"""An automatic checker of the demo's pictures: read back into scenes, and held against what a caption claims.

A picture is read by comparison with its border colour; nothing is shared with the drawing code but the palette and the
shapes' outlines.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage

from vipo.demo.scenes import BACKGROUNDS, COLORS, IMAGE_SIZE, SHAPES, outline_distance

# Halfway between the two sizes' radii, and half of the off-centre displacement that large objects can have.
_SIZE_BOUNDARY = 13.0
_OFF_CENTRE = 5.5
_FOREGROUND_DISTANCE = 0.25
_MIN_OBJECT_PIXELS = 30
_MIN_SHAPE_IOU = 0.75


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
