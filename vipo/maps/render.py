"""Drawings of a map and its picture: lines over it, dimmed surroundings, and the sheet that explains both."""

from collections.abc import Sequence
from typing import Literal

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from vipo.maps.veil import LINES, describe, dimmed, draw_contours, strength
from vipo.text import one_line

Style = Literal["sheet", "overlay", "contour"]
#: The longer side of one picture is enlarged to at least this many pixels, and made smaller above the second.
SMALLEST, LARGEST = 600, 1024
_GAP, _TITLE, _LINE = 12, 26, 18
_INK, _SOFT = (29, 33, 39), (86, 94, 105)


def enlarged(frames: Tensor) -> Tensor:
    """``(T, 3, H, W)`` at a size worth looking at; small pictures keep their hard pixel edges."""
    height, width = frames.shape[2:]
    side = max(height, width)
    if side < SMALLEST:
        factor = -(-SMALLEST // side)
        if side <= SMALLEST // 4:
            return F.interpolate(frames, scale_factor=factor, mode="nearest")
        return F.interpolate(frames, scale_factor=SMALLEST / side, mode="bicubic", align_corners=False).clamp(0, 1)
    scale = min(1.0, LARGEST / side)
    size = [max(1, round(length * scale)) for length in (height, width)]
    return F.interpolate(frames, size=size, mode="bilinear", antialias=True).clamp(0, 1)


def contoured(picture: Tensor, heat: Tensor) -> Image.Image:
    """The picture as it is with the map's lines: what `LINES` says."""
    return draw_contours(as_image(picture), heat).convert("RGB")


def overlaid(picture: Tensor, heat: Tensor) -> Image.Image:
    """The picture with its surroundings dimmed, and the map's lines."""
    return draw_contours(as_image(dimmed(picture, heat)), heat).convert("RGB")


def as_image(picture: Tensor) -> Image.Image:
    """``(3, H, W)`` in [0, 1] as a picture."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)


def component_colours(components: Tensor, size: tuple[int, int]) -> Image.Image:
    """The first three components ``(K, h', w')`` in [0, 1] as red, green and blue, smooth at ``(H, W)``."""
    three = F.pad(components[:3], (0, 0, 0, 0, 0, max(0, 3 - components.shape[0])))
    smooth = F.interpolate(three[None].float(), size=size, mode="bicubic", align_corners=False)[0].clamp(0, 1)
    return as_image(smooth)


def sheet(
    picture: Tensor, heat: Tensor, components: Tensor, explained: Sequence[float], *, constant: bool, note: str
) -> Image.Image:
    """Two by two: picture and map as light, map on the picture and components, with the figures below.

    Args:
        picture: ``(3, H, W)``, of the size that it is drawn at.
        heat: ``(h, w)``.
        components: ``(K, h', w')`` in [0, 1].
        explained: ratio of explained variance of each component.
        constant: whether there is no structure: the map is uniform.
        note: what made the map.
    """
    height, width = picture.shape[1:]
    shown = [f"{name} {100 * share:.0f} %" for name, share in zip(("red", "green", "blue"), explained, strict=False)]
    light = (strength(heat, (height, width)) * 255).round().to(torch.uint8).numpy()
    panels = [
        ("picture", as_image(picture)),
        ("no structure: uniform map" if constant else "on the picture: what gets the credit", overlaid(picture, heat)),
        ("map as opacity: white 1, black 0", Image.fromarray(light).convert("RGB")),
        ("components: " + ", ".join(shown) + " of the variance", component_colours(components, (height, width))),
    ]
    lines = [
        describe([heat]),
        f"lines: {LINES[0]}, {LINES[1]} · map {heat.shape[1]} x {heat.shape[0]}",
        *note.split("\n"),
    ]
    total = (2 * width + 3 * _GAP, 2 * (height + _TITLE) + 2 * _GAP + _LINE * len(lines) + _GAP)
    page = Image.new("RGB", total, "white")
    draw, font, small = ImageDraw.Draw(page), ImageFont.load_default(16), ImageFont.load_default(13)
    for number, (title, panel) in enumerate(panels):
        left = _GAP + (number % 2) * (width + _GAP)
        top = _GAP + (number // 2) * (height + _TITLE)
        draw.text((left, top), one_line(title, max(10, width // 8)), fill=_INK, font=font)
        page.paste(panel, (left, top + _TITLE - 4))
    top = 2 * (height + _TITLE) + 2 * _GAP
    for number, line in enumerate(lines):
        draw.text(
            (_GAP, top + number * _LINE), one_line(line, total[0] // 7), fill=_INK if number == 0 else _SOFT, font=small
        )
    return page


def side_by_side(panels: Sequence[Sequence[tuple[str, Image.Image]]]) -> Image.Image:
    """Rows of named pictures of one size: what comparisons are."""
    width, height = panels[0][0][1].size
    columns = max(map(len, panels))
    page = Image.new("RGB", (_GAP + columns * (width + _GAP), _GAP + len(panels) * (height + _TITLE + _GAP)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for row, line in enumerate(panels):
        for column, (title, panel) in enumerate(line):
            left, top = _GAP + column * (width + _GAP), _GAP + row * (height + _TITLE + _GAP)
            draw.text((left, top), one_line(title, max(10, width // 7)), fill=_INK, font=font)
            page.paste(panel, (left, top + _TITLE - 4))
    return page


def with_note(page: Image.Image, lines: Sequence[str]) -> Image.Image:
    """`page` with lines of text below it."""
    width, height = page.size
    noted = Image.new("RGB", (width, height + _LINE * len(lines) + _GAP), "white")
    noted.paste(page, (0, 0))
    draw, font = ImageDraw.Draw(noted), ImageFont.load_default(13)
    for number, line in enumerate(lines):
        draw.text((_GAP, height + number * _LINE), one_line(line, width // 7), fill=_SOFT, font=font)
    return noted
