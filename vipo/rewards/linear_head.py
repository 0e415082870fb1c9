"""The score head that LAION's aesthetic predictor and ImageReward share: linear layers alone, one after another."""

import itertools
import re
from collections.abc import Mapping

from torch import Tensor, nn

from vipo.rewards.errors import RewardError
from vipo.rewards.weights import fill

_WEIGHT = re.compile(r"layers\.(\d+)\.weight")


def linear_head(tensors: Mapping[str, Tensor], source: object) -> nn.Sequential:
    """The head whose tensors are ``layers.N.weight`` and ``.bias``; numbers between them were dropout, which is off.

    Published heads are 768-1024-128-64-16-1, without any activation.

    Returns:
        In float32, from ``(B, width)`` to ``(B, 1)``.

    Raises:
        RewardError: there is no such tensor, or they do not follow each other.
    """
    numbers = sorted(int(match[1]) for name in tensors if (match := _WEIGHT.fullmatch(name)))
    shapes = [tuple(tensors[f"layers.{number}.weight"].shape) for number in numbers]
    widths = [shape[::-1] for shape in shapes if len(shape) == 2]
    fits = all(before[1] == after[0] for before, after in itertools.pairwise(widths))
    if not widths or len(widths) != len(shapes) or not fits or widths[-1][1] != 1:
        raise RewardError(f"{source}: holds no linear layers that end in one score (layers.N: {shapes or 'none'})")
    head = nn.Sequential(*(nn.Linear(*width) for width in widths))
    renamed = {
        f"{position}.{kind}": tensors[name].float()
        for position, number in enumerate(numbers)
        for kind in ("weight", "bias")
        if (name := f"layers.{number}.{kind}") in tensors
    }
    fill(head, renamed, source, "fp32")
    return head
