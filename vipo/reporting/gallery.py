"""What the page shows of each prompt: references to pictures, and the scores of what they show."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vipo.evaluation.statistics import decimals

#: Folder of the pictures beside a page that does not hold them itself.
PICTURES = "thumbs"
#: Kept updates are shown of the first so many prompts.
HISTORY_PROMPTS = 64


@dataclass(frozen=True)
class Shot:
    """One sample of one run at one update.

    Attributes:
        picture, veil: what an ``img`` reads; a veil, there for final samples alone, lies over the picture.
        film, veiled_film: of a video, what a ``video`` reads: as it is, and with what its maps leave out dimmed.
        veiled_picture: the first picture of `veiled_film`, shown until it plays.
        scores: by column; NaN where it has none.
        original: the sample's file, relative to the experiment's folder.
    """

    run: str
    arm: str
    seed: int
    update: int
    final: bool
    picture: str
    veil: str | None
    film: str | None
    veiled_film: str | None
    veiled_picture: str | None
    scores: Mapping[str, float]
    original: str


@dataclass(frozen=True)
class ShownPrompt:
    """One prompt with the samples of one noise: of every run the final one, and those of kept updates."""

    id: str
    text: str
    shots: tuple[Shot, ...]

    def first(self, arm: str) -> Shot:
        """The final sample of an arm's first seed."""
        return next(shot for shot in self.shots if shot.arm == arm and shot.final)


@dataclass(frozen=True)
class Gallery:
    """All held-out prompts of an experiment, in the evaluation's order.

    Attributes:
        files: what lies beside the page, by path; empty where the page holds its pictures itself.
        size: width and height of a picture in pixels.
        pixelated: whether enlarged pictures keep hard pixel edges.
    """

    prompts: tuple[ShownPrompt, ...]
    files: Mapping[str, bytes]
    size: tuple[int, int]
    pixelated: bool

    @property
    def films(self) -> bool:
        """Whether the samples are videos."""
        return any(shot.film is not None for prompt in self.prompts[:1] for shot in prompt.shots)

    def digits(self, column: str) -> int:
        """Decimal places that show the largest gain of `column` over the base with two digits; at least 2."""
        gains = [
            shot.scores[column] - base.scores[column]
            for prompt in self.prompts
            for base in (prompt.first("base"),)
            for shot in prompt.shots
            if shot.final and math.isfinite(shot.scores[column] - base.scores[column])
        ]
        return max(2, decimals(*gains) - 1)

    @property
    def arms(self) -> list[str]:
        """Arms that are shown, in order."""
        return list(dict.fromkeys(shot.arm for prompt in self.prompts[:1] for shot in prompt.shots))

    @property
    def runs(self) -> list[Shot]:
        """The final sample of each run that is shown, of the first prompt."""
        return [shot for prompt in self.prompts[:1] for shot in prompt.shots if shot.final]


#: Of an experiment that nothing is evaluated of.
NO_PICTURES = Gallery((), {}, (1, 1), pixelated=False)
