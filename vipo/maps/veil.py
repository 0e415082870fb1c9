"""A map on its picture as people read it: surroundings dimmed, and at most two lines.

Nothing is tinted, so what matters most is what is changed least. The outer line encloses the positions that hold half
of the weight, the inner one the tenth of the positions with the largest weights.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

#: How dark a position of weight 0 becomes.
DIMMING = 0.8
#: What the lines enclose, outer first.
LINES = ("half of the weight", "the top tenth of positions")
_LINE_WIDTHS = (0.003, 0.005)
_SUPERSAMPLING = 2


def strength(heat: Tensor, size: tuple[int, int]) -> Tensor:
    """A map as smooth opacity: ``(h, w)``, >= 0, to ``(H, W)`` in [0, 1]; divided by its largest value above 1."""
    heat = heat.detach().float().cpu()
    scaled = (heat / heat.amax().clamp(min=1))[None, None]
    return F.interpolate(scaled, size=size, mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)


def dimmed(image: Tensor, heat: Tensor) -> Tensor:
    """``(3, H, W)`` in [0, 1] with what the map leaves out dimmed, without lines."""
    if image.ndim != 3 or image.shape[0] != 3 or heat.ndim != 2:
        raise ValueError(
            f"image, heat: expected shapes (3, H, W) and (h, w), got {tuple(image.shape)} and {tuple(heat.shape)}"
        )
    image = image.detach().float().cpu()
    shown = strength(heat, (image.shape[1], image.shape[2]))
    return (image * (1 - DIMMING * (1 - shown))).clamp(0, 1)


def levels(heat: Tensor) -> tuple[float, float]:
    """The weights at which `LINES` run, outer first: of a uniform map both are its one value."""
    ordered = heat.detach().double().flatten().sort(descending=True).values
    reached = ordered.cumsum(0) >= ordered.sum() / 2
    half = ordered[int(reached.int().argmax())]
    tenth = ordered[max(0, round(len(ordered) / 10) - 1)]
    return float(half), float(tenth)


def entropy(heat: Tensor) -> float:
    """Entropy of the weights over positions, relative to a uniform map's: 1 is uniform, 0 a single position."""
    shares = heat.detach().double().flatten()
    if len(shares) < 2 or float(shares.sum()) <= 0:
        return 1.0
    shares = shares / shares.sum()
    return float(torch.special.entr(shares).sum() / np.log(len(shares)))


def top_share(heat: Tensor, part: float = 0.1) -> float:
    """Share of the weight that the largest `part` of the positions holds (at least one position); `part` if uniform."""
    ordered = heat.detach().double().flatten().sort(descending=True).values
    if float(ordered.sum()) <= 0:
        return part
    return float(ordered[: max(1, round(part * len(ordered)))].sum() / ordered.sum())


def contours(heat: Tensor, size: tuple[int, int]) -> list[list[NDArray[np.float64]]]:
    """The lines of `LINES` on a picture of `size`, outer first: polylines ``(n, 2)`` of x and y in pixels.

    A map without structure has none.
    """
    from contourpy import contour_generator

    surface = strength(heat, size).numpy()
    if float(np.ptp(surface)) < 1e-6:
        return [[], []]
    scale = max(1.0, float(heat.amax()))
    generator = contour_generator(z=surface)
    outer, inner = (level / scale for level in levels(heat))
    # Just below a level, or a plateau at it has no line.
    found = [[np.asarray(line) for line in generator.lines(level - 1e-4)] for level in (outer, inner)]
    return found if inner - outer > 0.02 else [[], found[1]]


def draw_contours(picture: Image.Image, heat: Tensor) -> Image.Image:
    """`picture` (RGB or RGBA) with the lines of `heat` in white on a dark edge, which reads on any ground."""
    width, height = picture.size
    large = Image.new("RGBA", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    draw = ImageDraw.Draw(large)
    side = _SUPERSAMPLING * max(width, height)
    for lines, share in zip(contours(heat, (height, width)), _LINE_WIDTHS, strict=True):
        thick = max(_SUPERSAMPLING, round(share * side))
        for line in lines:
            points = [(float(x) * _SUPERSAMPLING, float(y) * _SUPERSAMPLING) for x, y in line + 0.5]
            draw.line(points, fill=(0, 0, 0, 150), width=2 * thick, joint="curve")
            draw.line(points, fill=(255, 255, 255, 255), width=thick, joint="curve")
    lines_only = large.resize((width, height), Image.Resampling.LANCZOS)
    return Image.alpha_composite(picture.convert("RGBA"), lines_only)


def veil(heat: Tensor, size: tuple[int, int]) -> Image.Image:
    """What is laid over a picture of `size` (height, width): dark where the map is low, with its lines."""
    opacity = DIMMING * (1 - strength(heat, size))
    pixels = np.zeros((*size, 4), dtype=np.uint8)
    pixels[..., 3] = (255 * opacity.numpy()).round()
    return draw_contours(Image.fromarray(pixels, "RGBA"), heat)


def describe(heats: Sequence[Tensor]) -> str:
    """Entropy and top share of maps in words, the mean over them."""
    mean_entropy = float(np.mean([entropy(heat) for heat in heats]))
    mean_share = float(np.mean([top_share(heat) for heat in heats]))
    return f"entropy {mean_entropy:.2f} of 1 · the top tenth of positions holds {100 * mean_share:.0f} % of the weight"
