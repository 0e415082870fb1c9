"""A sheet of samples with their maps, one row of pictures a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vipo.maps.veil import dimmed
from vipo.text import one_line

# Pixels. Smaller pictures are enlarged, so that they can be seen, larger ones made smaller.
_SMALLEST, _LARGEST, _GAP, _CAPTION, _LETTER = 96, 192, 4, 16, 6


@dataclass(frozen=True)
class ShownGroup:
    """Samples of one prompt.

    Attributes:
        prompt: its text.
        pictures: ``(n, 3, H, W)`` in [0, 1].
        maps: ``(n, h, w)``, >= 0; None: they have none.
    """

    prompt: str
    pictures: Tensor
    maps: Tensor | None


def sample_sheet(groups: Sequence[ShownGroup]) -> Image.Image:
    """Draw each group as its prompt, its pictures side by side, and below them the same with their maps over them."""
    rows = [(group.prompt, _tiled(group)) for group in groups]
    width = max(_LETTER * 20, *(tiles.shape[1] for _, tiles in rows))
    sheet = Image.new("RGB", (width, sum(_CAPTION + len(tiles) for _, tiles in rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_CAPTION - 5)
    top = 0
    for prompt, tiles in rows:
        draw.text((_GAP // 2, top + 1), one_line(prompt, width // _LETTER), fill="black", font=font)
        sheet.paste(Image.fromarray(tiles), (0, top + _CAPTION))
        top += _CAPTION + len(tiles)
    return sheet


def _tiled(group: ShownGroup) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """``(H', W', 3)``: the group's pictures, and below them its maps over them."""
    pictures = _resized(group.pictures.nan_to_num().clamp(0, 1))
    lines = [pictures]
    if group.maps is not None:
        lines.append(torch.stack([dimmed(*pair) for pair in zip(pictures, group.maps, strict=True)]))
    spaced = F.pad(torch.stack(lines), (0, _GAP, 0, _GAP), value=1.0)
    tiled = spaced.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    return (tiled * 255).round().to(torch.uint8).numpy()


def _resized(pictures: Tensor) -> Tensor:
    height, width = pictures.shape[2:]
    side = max(height, width)
    if side < _SMALLEST:
        factor = -(-_SMALLEST // side)
        return F.interpolate(pictures, scale_factor=factor, mode="nearest")
    scale = min(1.0, _LARGEST / side)
    size = [max(1, round(length * scale)) for length in (height, width)]
    return F.interpolate(pictures, size=size, mode="bilinear", antialias=True).clamp(0, 1)
