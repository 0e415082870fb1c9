"""Our rewrite of a reward beside its authors' own package, on the same pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageSequence

from vipo.config.reward import RewardSpec
from vipo.config.validation import ConfigError, validate_section
from vipo.regular import open_regular
from vipo.rewards.early import check_found
from vipo.rewards.errors import RewardError
from vipo.rewards.registry import find_reward, load_reward, score
from vipo.rewards.scored import Reward
from vipo.text import cause


class Original(NamedTuple):
    """A reward's own package: what it is served as (`vipo.rewards.served.originals`), arguments, place."""

    reward: str
    arguments: Mapping[str, Any]
    environment: str


ORIGINALS: Mapping[str, Original] = MappingProxyType(
    {
        "hpsv2": Original("originals:HPSv2", {}, "envs/hpsv2"),
        "imagereward": Original("originals:ImageReward", {}, "envs/imagereward"),
        "hpsv3": Original("originals:HPSv3", {}, "envs/hpsv3"),
        "flicker": Original("originals:VBench", {"dimension": "temporal_flickering"}, "envs/vbench"),
    }
)
"""By the name of our reward; the others have no package of their own that gives the same number."""

_MOST_BYTES, _MOST_PIXELS = 2**30, 2**25
"""Of a picture, or of all frames of a clip."""


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
    """Score pictures or clips with a reward here, and with its original in another process.

    Args:
        name: the reward.
        options: its own.
        original: options of the reward `process`; without ``reward``, what `ORIGINALS` has for `name`.
        pictures: files; one that holds several frames (PNG, WebP, GIF) is a clip.
        prompts: one for each picture, or one for all.
        device: where both compute.

    Raises:
        RewardError: options are wrong, a picture cannot be read, the numbers do not fit, loading or scoring fails.
            That weights or environment are not here is no error but a reason to skip.
    """
    if len(prompts) not in (1, len(pictures)) or not pictures:
        raise RewardError(f"{len(pictures)} pictures and {len(prompts)} prompts: give one prompt, or one a picture")
    if "reward" not in original and name not in ORIGINALS:
        raise RewardError(f"reward {name!r}: name its original (--original module:object)")
    known = ORIGINALS.get(name)
    if "reward" not in original and known is not None:
        arguments = {**known.arguments, **original.get("arguments", {})}
        there = {} if "url" in original else {"environment": known.environment}
        original = {**there, **original, "reward": known.reward, "arguments": arguments}
    specs = [_spec(name, options), _spec("process", original)]
    texts = list(prompts) if len(prompts) == len(pictures) else [prompts[0]] * len(pictures)
    images = [_read(path) for path in pictures]
    try:
        for spec in specs:
            check_found(spec)
    except RewardError as error:
        return Beside([], [], [], str(error))
    ours, theirs = (load_reward(spec.name, device, spec.options) for spec in specs)

    def scored(label: str, reward: Reward) -> list[float]:
        return [float(score(label, reward, image, [text], [{}])) for image, text in zip(images, texts, strict=True)]

    return Beside([str(path) for path in pictures], scored(name, ours), scored("original", theirs))


def _spec(name: str, options: Mapping[str, Any]) -> RewardSpec:
    # What is wrong with the options is an error, whatever else is missing.
    find_reward(name, options)
    try:
        return validate_section(RewardSpec, {"name": name, "options": dict(options)})
    except ConfigError as error:
        raise RewardError(f"reward {name!r}: {'; '.join(str(error).splitlines())}") from error


def _read(path: Path) -> torch.Tensor:
    """``(1, 3, H, W)`` of a picture, ``(1, T, 3, H, W)`` of a file of several frames, in [0, 1]."""
    try:
        with open_regular(path, _MOST_BYTES) as stream, Image.open(stream) as image:
            if (pixels := image.width * image.height * getattr(image, "n_frames", 1)) > _MOST_PIXELS:
                raise RewardError(f"{path}: has {pixels} pixels, at most {_MOST_PIXELS} are read; make it smaller")
            frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RewardError(f"{path}: is no picture ({cause(error)}); name a PNG, JPEG or WebP") from error
    levels = torch.from_numpy(np.stack(frames)).movedim(-1, 1).float() / 255
    return levels if len(levels) == 1 else levels[None]
