"""Drawn clips: one flat shape that moves across a flat background, and its captions (``pretrain.drawn: motion``)."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vipo.demo.scenes import BACKGROUNDS, COLORS, SHAPES, outline_distance

SIZE, FRAMES = 32, 9
DIRECTIONS: Mapping[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

_STEP = 1.25
_RADIUS = (6.5, 7.5)
_OFFSET = 1.0


@dataclass(frozen=True)
class MovingShape:
    """A shape of `radius` pixels whose centre is (`x`, `y`) pixels from the picture's at the middle frame."""

    shape: str
    color: str
    background: str
    direction: str
    x: float
    y: float
    radius: float


def sample_clip(rng: np.random.Generator) -> MovingShape:
    """A random clip."""
    shape, color, background, direction = (
        str(rng.choice(list(names))) for names in (SHAPES, COLORS, BACKGROUNDS, DIRECTIONS)
    )
    x, y = (float(rng.uniform(-_OFFSET, _OFFSET)) for _ in range(2))
    return MovingShape(shape, color, background, direction, x, y, float(rng.uniform(*_RADIUS)))


def draw(item: MovingShape) -> NDArray[np.float32]:
    """The clip, ``(3, 9, 32, 32)`` float32 in [0, 1]: 1.25 pixels a frame, edges antialiased over one pixel."""
    axis = np.arange(SIZE, dtype=np.float64) + 0.5 - SIZE / 2
    right, down = DIRECTIONS[item.direction]
    background, color = np.array(BACKGROUNDS[item.background]), np.array(COLORS[item.color])
    frames = []
    for frame in range(FRAMES):
        way = _STEP * (frame - (FRAMES - 1) / 2)
        x, y = axis[None, :] - item.x - way * right, axis[:, None] - item.y - way * down
        coverage = np.clip(0.5 - outline_distance(item.shape, x, y, item.radius), 0.0, 1.0)
        frames.append(background[:, None, None] * (1.0 - coverage) + color[:, None, None] * coverage)
    return np.stack(frames, axis=1).astype(np.float32)


def captions(item: MovingShape) -> tuple[str, ...]:
    """With and without the colour."""
    return tuple(caption(item.shape, item.direction, item.background, color) for color in (None, item.color))


def caption(shape: str, direction: str, background: str, color: str | None = None) -> str:
    """As in ``a red circle moves left on a white background``."""
    return f"a {'' if color is None else f'{color} '}{shape} moves {direction} on a {background} background"


def colourless_captions() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every caption that names no colour, each with what it claims."""
    for shape, direction, background in itertools.product(SHAPES, DIRECTIONS, BACKGROUNDS):
        yield (
            caption(shape, direction, background),
            {"objects": [{"shape": shape}], "background": background, "direction": direction},
        )
