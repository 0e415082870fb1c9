"""Our rewrite of a reward beside its authors' own package, on the same pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image

from vipo.regular import open_regular
from vipo.rewards.errors import RewardError
from vipo.rewards.registry import Reward, load_reward, score
from vipo.text import cause

ORIGINALS: Mapping[str, str] = MappingProxyType(
    {"hpsv2": "originals:HPSv2", "imagereward": "originals:ImageReward", "hpsv3": "originals:HPSv3"}
)
"""What a reward's own package is served as (`vipo.rewards.served.originals`), by the reward's name."""

_MOST_BYTES, _MOST_PIXELS = 2**30, 2**25
"""Of a picture."""


@dataclass(frozen=True)
class Beside:
    """Scores of the same pictures.

    Attributes:
        names: of the pictures.
        ours, theirs: by picture; none where it was skipped.
        skipped: why nothing was scored; empty where it was.
    """

    names: list[str]
    ours: list[float]
    theirs: list[float]
    skipped: str = ""

    @property
    def largest(self) -> float:
        """The largest difference of two scores of one picture."""
        return max(abs(a - b) for a, b in zip(self.ours, self.theirs, strict=True))

    def text(self) -> str:
        """For people."""
        if self.skipped:
            return f"skipped, nothing was scored: {self.skipped}"
        rows = zip(self.names, self.ours, self.theirs, strict=True)
        lines = [f"{ours:>12.6f} {theirs:>12.6f} {ours - theirs:>+12.2e}  {name}" for name, ours, theirs in rows]
        head = f"{'ours':>12} {'theirs':>12} {'difference':>12}  picture"
        return "\n".join([head, *lines, f"largest difference {self.largest:.2e} over {len(self.names)} pictures"])


def score_beside(
    name: str,
    options: Mapping[str, Any],
    original: Mapping[str, Any],
    pictures: Sequence[Path],
    prompts: Sequence[str],
    device: str = "cpu",
) -> Beside:
    """Score pictures with a reward here, and with its original in another process.

    Args:
        name: the reward.
        options: its own.
        original: options of the reward `process`; without ``reward``, the one that `ORIGINALS` has for `name`.
        pictures: files.
        prompts: one for each picture, or one for all.
        device: where both compute.

    Raises:
        RewardError: a picture cannot be read, the numbers do not fit, or scoring fails. That weights or environment
            are not here is no error but a reason to skip.
    """
    if len(prompts) not in (1, len(pictures)) or not pictures:
        raise RewardError(f"{len(pictures)} pictures and {len(prompts)} prompts: give one prompt, or one a picture")
    if "reward" not in original and name not in ORIGINALS:
        raise RewardError(f"reward {name!r}: name its original (--original module:object)")
    texts = list(prompts) if len(prompts) == len(pictures) else [prompts[0]] * len(pictures)
    images = [_read(path) for path in pictures]
    try:
        ours = load_reward(name, device, options)
        theirs = load_reward("process", device, {"reward": ORIGINALS.get(name), **original})
    except RewardError as error:
        return Beside([], [], [], str(error))

    def scored(label: str, reward: Reward) -> list[float]:
        return [float(score(label, reward, image, [text], [{}])) for image, text in zip(images, texts, strict=True)]

    return Beside([str(path) for path in pictures], scored(name, ours), scored("original", theirs))


def _read(path: Path) -> torch.Tensor:
    try:
        with open_regular(path, _MOST_BYTES) as stream, Image.open(stream) as image:
            if (pixels := image.width * image.height) > _MOST_PIXELS:
                raise RewardError(f"{path}: has {pixels} pixels, at most {_MOST_PIXELS} are read; make it smaller")
            levels = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RewardError(f"{path}: is no picture ({cause(error)}); name a PNG, JPEG or WebP") from error
    return torch.from_numpy(levels).movedim(-1, 0)[None].float() / 255
