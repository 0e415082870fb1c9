"""Preprocessing as published rewards do it, in torch: batched, on any device, with a gradient to the pictures.

Published scores are of 8-bit files. Rounding to them has no gradient of its own; the gradient goes straight through
(Bengio et al., arXiv 1308.3432).
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vipo.rewards.errors import RewardError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class _Rounded(torch.autograd.Function):
    """``floor(x + 1/2)`` held in [0, 255]; the gradient as if it were x."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return (values + 0.5).floor().clamp(0, 255)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


class _Bicubic(torch.autograd.Function):
    """``F.interpolate``, whose backward pass has no deterministic kernel on CUDA: its transpose, by two products."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor, height: int, width: int) -> Tensor:
        ctx.sizes = ((levels.shape[2], height), (levels.shape[3], width))
        return F.interpolate(levels, size=(height, width), mode="bicubic", antialias=True, align_corners=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        rows, columns = (_weights(before, after, gradients[0]) for before, after in ctx.sizes)
        return rows.T @ gradients[0] @ columns, None, None


def _weights(before: int, after: int, like: Tensor) -> Tensor:
    """What each of `after` lines takes of each of `before`, ``(after, before)``."""
    eye = torch.eye(before, dtype=like.dtype, device=like.device)[None, None]
    return F.interpolate(eye, size=(after, before), mode="bicubic", antialias=True, align_corners=False)[0, 0]


def bicubic(levels: Tensor, height: int, width: int) -> Tensor:
    """Bicubic resize with antialiasing, ``(B, C, H, W)`` to ``(B, C, height, width)``, in floating point."""
    resized: Tensor = _Bicubic.apply(levels, height, width)
    return resized


def need_pictures(images: Tensor) -> None:
    """Refuse videos.

    Raises:
        RewardError: `images` are not ``(B, 3, H, W)``.
    """
    if images.ndim != 4:
        raise RewardError(
            f"takes pictures (B, 3, H, W), not videos of shape {tuple(images.shape)}; use 'redness', 'flicker' or "
            "'motion'"
        )


def grey_levels(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as 8-bit files hold them: whole numbers from 0 to 255, float64."""
    rounded: Tensor = _Rounded.apply(images.double() * 255)
    return rounded


def eight_bit(images: Tensor) -> np.ndarray[Any, Any]:
    """Pictures ``(..., 3, H, W)`` in [0, 1] as Pillow has them: ``(..., H, W, 3)`` uint8; NaN is black."""
    levels = grey_levels(images.detach().nan_to_num(0.0)).byte()
    found: np.ndarray[Any, Any] = levels.movedim(-3, -1).contiguous().cpu().numpy()
    return found


def rounded(levels: Tensor) -> Tensor:
    """Grey levels that a resize has made, rounded and held in [0, 255] as an 8-bit picture has them."""
    whole: Tensor = _Rounded.apply(levels)
    return whole


def pil_bicubic(levels: Tensor, height: int, width: int) -> Tensor:
    """Bicubic resize as Pillow does it to an 8-bit picture: first its rows, then its columns, each rounded.

    Equal to Pillow's but for values halfway between two grey levels: its weights have 22 binary digits. From Pillow 13
    on, a height that shrinks much more than the width goes first; what is published was measured before.

    Args:
        levels: ``(B, 3, H, W)`` as `grey_levels` gives them.

    Returns:
        ``(B, 3, height, width)``, whole numbers from 0 to 255.
    """
    for size in ((levels.shape[2], width), (height, width)):
        if tuple(levels.shape[2:]) != size:
            levels = _Rounded.apply(bicubic(levels, *size))
    return levels


def shortest_side(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with the shorter one `size` and the longer one in proportion, cut to a whole number."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def centre_crop(images: Tensor, size: int, *, nearest: bool) -> Tensor:
    """The middle ``size x size``.

    Args:
        images: ``(B, 3, H, W)``, both sides at least `size`.
        nearest: where an odd number of rows is left over, torchvision rounds half of it to the nearest even number;
            else, as transformers, down.
    """
    over = (images.shape[2] - size, images.shape[3] - size)
    top, left = (round(o / 2) if nearest else o // 2 for o in over)
    return images[..., top : top + size, left : left + size]


def normalised(levels: Tensor) -> Tensor:
    """Grey levels with CLIP's mean and standard deviation taken out, float32."""
    mean, std = (
        torch.tensor(v, device=levels.device, dtype=levels.dtype).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD)
    )
    return ((levels / 255 - mean) / std).float()


def clip_pixels(images: Tensor, size: int, *, nearest: bool) -> Tensor:
    """CLIP's preprocessing: shorter side to `size`, bicubic as Pillow's, middle square, normalised.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        nearest: see `centre_crop`.

    Returns:
        ``(B, 3, size, size)`` float32.
    """
    resized = pil_bicubic(grey_levels(images), *shortest_side(images.shape[2], images.shape[3], size))
    return normalised(centre_crop(resized, size, nearest=nearest))


def padded_pixels(images: Tensor, size: int) -> Tensor:
    """HPSv2's preprocessing: longer side to `size`, zeros around to a square, normalised.

    It resizes the tensor, not the 8-bit picture: in floating point, neither rounded nor clamped.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].

    Returns:
        ``(B, 3, size, size)`` float32.
    """
    levels = grey_levels(images)
    scale = size / max(images.shape[2:])
    height, width = (max(1, round(side * scale)) for side in images.shape[2:])
    if (height, width) != tuple(images.shape[2:]):
        levels = bicubic(levels.float() / 255, height, width) * 255
    down, right = size - height, size - width
    return normalised(F.pad(levels.double(), (right // 2, right - right // 2, down // 2, down - down // 2)))
