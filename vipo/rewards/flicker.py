"""How little a clip changes from frame to frame."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vipo.rewards.errors import RewardError
from vipo.rewards.scored import Scored


def flicker(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scored:
    """``1 - mean |x_(t+1) - x_t|`` over channels, pixels and pairs of frames: ``(B,)`` in [0, 1]; 1 stands still.

    Where: of each frame, how much it differs from its neighbours in time. It rewards stillness as much as steadiness:
    let `motion` hold against it.

    Source: VBench, arXiv 2311.17982, temporal flickering, on all clips instead of those whose text asks for no motion.

    Raises:
        RewardError: `images` are not clips of two frames or more.
    """
    need_clips(images)
    change = (images[:, 1:] - images[:, :-1]).abs().mean(dim=2)
    return Scored(1 - change.mean(dim=(1, 2, 3)), of_frames(change))


def need_clips(images: Tensor) -> None:
    """Refuse pictures, and clips of one frame.

    Raises:
        RewardError: they are.
    """
    if images.ndim != 5 or images.shape[1] < 2:
        raise RewardError(f"takes videos (B, T, 3, H, W) of two frames or more, not {tuple(images.shape)}")


def of_frames(pairs: Tensor) -> Tensor:
    """Values ``(B, T - 1, h, w)`` of pairs of frames as values of frames ``(B, T, h, w)``, means of their pairs."""
    outer = torch.zeros_like(pairs[:, :1])
    both = torch.cat([outer, pairs], dim=1) + torch.cat([pairs, outer], dim=1)
    both[:, 1:-1] /= 2
    return both
