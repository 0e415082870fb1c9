"""The paper's rule-based stress test: how red a picture is."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def redness_map(images: Tensor) -> Tensor:
    """``x_R - (x_G + x_B) / 2`` of every pixel: ``(B, [T,] 3, H, W)`` in [0, 1] to ``(B, [T,] H, W)`` in [-1, 1]."""
    red, green, blue = images.unbind(dim=-3)
    return red - (green + blue) / 2


def redness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """Mean redness of the whole picture, or of all frames: ``(B,)`` in [-1, 1].

    Source: ViPO, arXiv 2511.18719, stress test.
    """
    values = redness_map(images)
    return values.mean(dim=tuple(range(1, values.ndim)))
