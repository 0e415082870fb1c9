"""How much the samples of one prompt differ from each other: one prompt's pictures in memory at a time."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import adaptive_avg_pool2d

from vipo.evaluation.held_out import HeldOut, read_samples

#: Pictures are compared at this size, by means of areas: noise of single pixels is no diversity.
SIDE = 16


def diversity(folder: Path, update: int, samples: Sequence[HeldOut], *, video: bool) -> dict[str, float]:
    """Mean root mean square difference of a prompt's samples, in pairs, by prompt id; in [0, 1].

    Args:
        folder: ``samples/<run>/pictures``.
        update: whose samples.
        samples: all that were drawn.
        video: whether they are videos, of which frames are compared in place.

    Returns:
        Prompts of one sample have none and are left out.

    Raises:
        EvaluationError: a picture is missing or damaged.
    """
    groups: dict[str, list[HeldOut]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt.id, []).append(sample)
    found = {}
    for prompt, own in groups.items():
        if len(own) < 2:
            continue
        images = read_samples(folder, update, own, video=video)
        small = adaptive_avg_pool2d(images.flatten(0, -4), SIDE).reshape(len(own), -1).double()
        pairs = torch.combinations(torch.arange(len(own)))
        distance = (small[pairs[:, 0]] - small[pairs[:, 1]]).square().mean(dim=1).sqrt()
        found[prompt] = float(distance.mean())
    return found
