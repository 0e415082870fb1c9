"""What a reward is, and what it gives."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Scored(NamedTuple):
    """What a reward found, and where.

    Attributes:
        scores: ``(B,)``; larger is better.
        where: ``(B, h, w)``, or ``(B, T, h, w)`` of videos: how much each part of a sample, from its upper left corner
            to its lower right one, has to do with its score; finite, >= 0, on a scale of the reward's own. All zero:
            nowhere in particular. None: the reward does not say.
    """

    scores: Tensor
    where: Tensor | None = None


Reward = Callable[[Tensor, Sequence[str], Sequence[Mapping[str, Any]]], Tensor | Scored]
"""``(images (B, 3, H, W) or videos (B, T, 3, H, W) float32 in [0, 1], prompts, metadata) -> (B,)``, or `Scored`.

Larger is better. A reward takes pictures, videos or both, and raises `RewardError` for what it does not take.
"""
