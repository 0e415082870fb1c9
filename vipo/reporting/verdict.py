"""Two arms at equal change of the picture: what the page says first, with the intervals that it earned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vipo.evaluation.means import trained_rows
from vipo.evaluation.statistics import MINIMUM_SEEDS, Better, tail_probability
from vipo.keys import keyed_seed

CHANGE = "change/total"
Word = Literal["better", "worse", "not shown"]
_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Span:
    """An estimate and its interval."""

    estimate: float
    low: float
    high: float

    def against(self, neutral: float) -> int:
        """1 or -1 where all of the interval lies above or below `neutral`, else 0."""
        return int(self.low > neutral) - int(self.high < neutral)


@dataclass(frozen=True)
class SideEffect:
    """What nobody rewarded, at the same change: each arm against the base, and both against each other."""

    column: str
    arm: Span
    reference: Span
    between: Span


@dataclass(frozen=True)
class EqualChange:
    """An arm against a reference, both read where their pictures changed equally far from the base's.

    Attributes:
        level: that change, the largest one that both curves reach; mean absolute pixel difference.
        updates: where each curve reaches it, of arm and reference.
        gain, reference_gain: of `column` over the base there, in its own direction.
        share: the arm's gain over the reference's; None where the reference's own gain is not shown.
        difference: the arm's gain minus the reference's.
        seeds: of arm and reference.
        over_seeds: whether the intervals resample seeds too; else they are conditional on them.
    """

    arm: str
    reference: str
    column: str
    level: float
    updates: tuple[float, float]
    gain: Span
    reference_gain: Span
    share: Span | None
    difference: Span
    effects: tuple[SideEffect, ...]
    seeds: tuple[int, int]
    over_seeds: bool
    prompts: int

    @property
    def word(self) -> Word:
        """What the interval of the headline figure earns."""
        sign = self.difference.against(0) if self.share is None else self.share.against(1)
        words: dict[int, Word] = {1: "better", -1: "worse", 0: "not shown"}
        return words[sign]


def equal_change(
    scores: pd.DataFrame,
    arm: str,
    reference: str,
    column: str,
    others: Sequence[str],
    *,
    better: Better,
    resamples: int,
    confidence: float,
    seed: int,
) -> EqualChange | None:
    """Compare two arms at the largest change of the picture that both reached.

    Curves are means over samples, prompts and seeds at the evaluated updates, linear between them. Each bootstrap draw
    resamples prompts, and from five seeds a side on seeds too, and repeats everything: level, crossing and ratio.
    Limits are expanded percentiles (`tail_probability`).

    Args:
        scores: rows of all runs, with the base at update 0.
        column: the trained reward.
        others: columns that were not rewarded.
        better: the direction in which `column` was trained.

    Returns:
        None where an arm has no rows, its seeds were not evaluated at the same updates, or its pictures never changed.
    """
    columns = [CHANGE, column, *others]
    base = scores[scores["update"] == 0]
    sides = [trained_rows(scores[scores["arm"] == name]) for name in (arm, reference)]
    if base.empty or any(side.empty for side in sides):
        return None
    cubes = [cube for rows in (base, *sides) if (cube := _cube(rows, columns)) is not None]
    if len(cubes) <= len(sides):
        return None
    updates = [np.array([0, *sorted(side["update"].unique())], dtype=np.float64) for side in sides]
    prompts, seeds = cubes[0].shape[-1], (cubes[1].shape[1], cubes[2].shape[1])
    over_seeds = min(seeds) >= MINIMUM_SEEDS
    rng = np.random.default_rng(keyed_seed("equal change", seed))
    sign = 1.0 if better == "higher" else -1.0

    # Prompts by column; of some a column may have no score. Then its means are over the others.
    known = np.logical_and.reduce([np.isfinite(cube).all(axis=(1, 2)) for cube in cubes])
    start, *curves = (np.where(known[:, None, None], cube, 0) for cube in cubes)
    whole = known.all(axis=1)

    def read(prompt_weights: _Array, seed_weights: Sequence[_Array]) -> _Array | None:
        shares = np.where(whole, 1.0, np.einsum("kp,p->k", known.astype(np.float64), prompt_weights))
        if not shares.all():
            return None
        means = [
            np.concatenate(
                [
                    np.einsum("ksup,p->ku", start, prompt_weights),
                    np.einsum("ksup,s,p->ku", curve, weights, prompt_weights),
                ],
                axis=1,
            )
            / shares[:, None]
            for curve, weights in zip(curves, seed_weights, strict=True)
        ]
        level = min(float(mean[0].max()) for mean in means)
        if level <= 0:
            return None
        found = [_at(mean, own, level) for mean, own in zip(means, updates, strict=True)]
        origin = np.einsum("ksup,p->k", start, prompt_weights) / shares
        return np.concatenate([[level], *[np.concatenate([point[:1], point[2:] - origin[1:]]) for point in found]])

    even = [np.full(count, 1 / count) for count in (prompts, *seeds)]
    estimate = read(even[0], even[1:])
    if estimate is None:
        return None
    draws = []
    same = (
        over_seeds and seeds[0] == seeds[1] and sides[0]["seed"].unique().tolist() == sides[1]["seed"].unique().tolist()
    )
    for _ in range(resamples):
        prompt_weights = _drawn(rng, prompts)
        own = _drawn(rng, seeds[0]) if over_seeds else even[1]
        other = own if same else _drawn(rng, seeds[1]) if over_seeds else even[2]
        draw = read(prompt_weights, (own, other))
        if draw is not None:
            draws.append(draw)
    tail = tail_probability(confidence, min(seeds) if over_seeds else prompts)
    # A row: the level, then of each arm its update, its gain and its side effects.
    width = len(columns)
    table = np.array(draws)

    def span(of: Callable[[_Array], _Array]) -> Span:
        values = of(table)
        low, high = np.quantile(values, [tail, 1 - tail])
        return Span(float(of(estimate[None])[0]), float(low), float(high))

    first, second = 2, 2 + width
    gain = span(lambda rows: sign * rows[:, first])
    reference_gain = span(lambda rows: sign * rows[:, second])
    return EqualChange(
        arm=arm,
        reference=reference,
        column=column,
        level=float(estimate[0]),
        updates=(float(estimate[1]), float(estimate[1 + width])),
        gain=gain,
        reference_gain=reference_gain,
        share=span(lambda rows: rows[:, first] / rows[:, second]) if reference_gain.low > 0 else None,
        difference=span(lambda rows: sign * (rows[:, first] - rows[:, second])),
        effects=tuple(
            SideEffect(
                name,
                span(partial(_column, first + number)),
                span(partial(_column, second + number)),
                span(partial(_apart, first + number, second + number)),
            )
            for number, name in enumerate(others, start=1)
        ),
        seeds=seeds,
        over_seeds=over_seeds,
        prompts=prompts,
    )


def _column(place: int, rows: _Array) -> _Array:
    return rows[:, place]


def _apart(place: int, other: int, rows: _Array) -> _Array:
    return rows[:, place] - rows[:, other]


def _drawn(rng: np.random.Generator, units: int) -> _Array:
    return rng.multinomial(units, np.full(units, 1 / units)) / units


def _cube(rows: pd.DataFrame, columns: Sequence[str]) -> _Array | None:
    """``(columns, seeds, updates, prompts)``: means over samples; None where a combination is missing."""
    means = rows.groupby(["seed", "update", "prompt_id"], sort=True)[list(columns)].mean()
    counts = [means.index.get_level_values(level).nunique() for level in ("seed", "update", "prompt_id")]
    if len(means) != counts[0] * counts[1] * counts[2]:
        return None
    return means.to_numpy(dtype=np.float64).T.reshape(len(columns), *counts)


def _at(curve: _Array, updates: _Array, level: float) -> _Array:
    """Update and columns of ``curve (columns, updates)`` where its first column first reaches `level`."""
    heights = curve[0]
    after = max(1, int(np.argmax(heights >= level)))
    share = (level - heights[after - 1]) / (heights[after] - heights[after - 1])
    rows = np.concatenate([updates[None], curve])
    return rows[:, after - 1] + share * (rows[:, after] - rows[:, after - 1])
