"""Comparisons of arms with intervals. All functions are pure and take the rows of `scores.parquet`, as do means."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from vipo.evaluation.left_out import told
from vipo.evaluation.means import ScoresError, Side, require_same_pairs, sides_of, trained_rows
from vipo.keys import keyed_seed

#: Fewer seeds than this cannot carry an interval over seeds.
MINIMUM_SEEDS = 5

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Interval:
    """A difference of means and its bootstrap interval.

    `unit` says what was resampled: ``"seeds"`` (and prompts), or ``"prompts"`` alone, where the
    interval is conditional on the seeds that were run, as `note` then says.
    """

    estimate: float
    low: float
    high: float
    unit: Literal["seeds", "prompts"]
    note: str

    @property
    def includes_zero(self) -> bool:
        """Whether no difference lies inside the interval."""
        return self.low <= 0 <= self.high


def paired_difference(
    scores: pd.DataFrame,
    reference: pd.DataFrame,
    column: str,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of `column` in one arm minus its mean in another, with a bootstrap interval.

    With at least five seeds on both sides (an untrained side, all of update 0, has none and does not
    count), seeds and prompts are resampled as crossed factors (the pigeonhole bootstrap of Owen,
    2007); sides with the same seeds are paired by seed, as they share prompts and noise in training.
    With fewer, prompts alone are resampled after averaging over seeds and samples. The limits are
    percentiles widened for the number of resampled units (the expanded percentile interval of
    Hesterberg, 2015, section 5.1), as the plain ones are too narrow for few units.

    Args:
        scores: rows of one arm at one update: `seed`, `update`, `prompt_id`, `sample` and `column`.
        reference: rows of the other arm, with the same pairs of `prompt_id` and `sample`.
        column: which score is compared.
        resamples: bootstrap draws.
        confidence: nominal coverage, in (0, 1).
        seed: key of the draws; the same inputs and seed give the same interval.

    Raises:
        ScoresError: a pair is missing or doubled (named), a value is infinite, or there are fewer
            than two prompts.
        ValueError: `confidence` is out of range.
    """
    ours, theirs = sides_of(scores, [column]), sides_of(reference, [column])
    return _paired(ours[column], theirs[column], column, resamples, confidence, seed)


def _paired(ours: Side, theirs: Side, column: str, resamples: int, confidence: float, seed: int) -> Interval:
    require_same_pairs(ours, theirs)
    values, others = ours.means, theirs.means
    prompts = values.shape[1]
    if prompts < 2:
        raise ScoresError(f"{column}: one prompt has no spread to resample; evaluate at least 2 prompts")
    seed_counts = [len(side.seeds) for side in (ours, theirs) if side.trained]
    fewest = min(seed_counts, default=0)

    rng = np.random.default_rng(keyed_seed("bootstrap", seed))
    prompt_weights = resampled(rng, prompts, resamples)
    if fewest >= MINIMUM_SEEDS:
        weights = resampled(rng, len(values), resamples)
        other_weights = weights if ours.seeds.equals(theirs.seeds) else resampled(rng, len(others), resamples)
        draws = _crossed(weights, values, prompt_weights) - _crossed(other_weights, others, prompt_weights)
        unit: Literal["seeds", "prompts"] = "seeds"
        units, note = fewest, f"over {fewest} seeds and {prompts} prompts"
    else:
        draws = np.einsum("bp,p->b", prompt_weights, values.mean(axis=0) - others.mean(axis=0))
        unit, units, note = "prompts", prompts, "conditional on these seeds"
    tail = tail_probability(confidence, units)
    low, high = np.quantile(draws, [tail, 1 - tail])
    estimate = float((values.mean(axis=0) - others.mean(axis=0)).mean())
    return Interval(estimate, float(low), float(high), unit, note)


def independent_difference(
    scores: pd.DataFrame, reference: pd.DataFrame, column: str, *, confidence: float = 0.95
) -> Interval:
    """Mean of `column` in one arm minus its mean in another that saw other prompts or other noise: Welch's interval.

    The units are prompts, each averaged over seeds and samples, so the interval is conditional on the seeds.

    Args:
        scores: rows of one arm at one update: `seed`, `update`, `prompt_id`, `sample` and `column`.
        reference: rows of the other arm.
        column: which score is compared.
        confidence: nominal coverage, in (0, 1).

    Raises:
        ScoresError: a pair is doubled, a value is infinite, or a side has fewer than two prompts.
    """
    sides = [sides_of(rows, [column])[column].means.mean(axis=0) for rows in (scores, reference)]
    if min(map(len, sides)) < 2:
        raise ScoresError(f"{column}: one prompt has no spread; evaluate at least 2 prompts")
    estimate = float(sides[0].mean() - sides[1].mean())
    note = "not paired, conditional on these seeds"
    if all(np.ptp(values) == 0 for values in sides):
        return Interval(estimate, estimate, estimate, "prompts", note)
    # Loading it takes a second, which only this comparison needs.
    from scipy import stats

    limits = stats.ttest_ind(*sides, equal_var=False).confidence_interval(confidence)
    return Interval(estimate, float(limits.low), float(limits.high), "prompts", note)


def tail_probability(confidence: float, units: int) -> float:
    """Quantile level of the lower limit: Hesterberg's expanded percentile for `units` resampled units.

    It makes a percentile interval of normal data as wide as Student's, which the plain one
    undershoots by the factor ``sqrt((n - 1) / n)`` and by the normal quantile.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} must lie in (0, 1)")
    student = special.stdtrit(units - 1, (1 - confidence) / 2)
    return float(special.ndtr(math.sqrt(units / (units - 1)) * student))


def compare_arms(
    scores: pd.DataFrame,
    columns: Sequence[str],
    *,
    references: Sequence[str] = ("base", "grpo"),
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Every trained arm at every evaluated update against the reference arms.

    The untrained base is compared with every update; another reference at the same update, and its
    final weights with final weights. References that are absent, or have no such update, give no row.

    Args:
        scores: rows of all runs, as in `scores.parquet`.
        columns: scores to compare.
        references: arms to compare with.

    Returns:
        One row per arm, update, column and reference: `arm`, `update`, `final`, `column`, `seeds`,
        `mean`, `reference`, `difference`, `low`, `high`, `unit`, `note`.

    Raises:
        ScoresError: as `paired_difference`.
    """
    rows: list[dict[str, Any]] = []
    # One reference serves many arms.
    known: dict[tuple[str, Any], Mapping[str, Side]] = {}
    for (arm, update, final), ours in trained_rows(scores).groupby(["arm", "update", "final"], sort=False):
        sides = sides_of(ours, columns)
        for reference in (name for name in references if name != arm):
            theirs = scores[scores["arm"] == reference]
            place = None
            if (theirs["update"] > 0).any():
                place = "final" if final else update
                theirs = theirs[theirs["final"]] if final else theirs[theirs["update"] == update]
            if theirs.empty:
                continue
            if (reference, place) not in known:
                known[reference, place] = sides_of(theirs, columns)
            others = known[reference, place]
            for column in columns:
                text = told(pd.concat([ours, theirs]), column)
                interval = _paired(sides[column], others[column], column, resamples, confidence, seed)
                rows.append(
                    {
                        "arm": arm,
                        "update": update,
                        "final": final,
                        "column": column,
                        "seeds": ours["seed"].nunique(),
                        "mean": float(sides[column].means.mean()),
                        "reference": reference,
                        "difference": interval.estimate,
                        "low": interval.low,
                        "high": interval.high,
                        "unit": interval.unit,
                        "note": f"{interval.note}; {text}" if text else interval.note,
                    }
                )
    names = "arm update final column seeds mean reference difference low high unit note"
    return pd.DataFrame(rows, columns=names.split())


def seed_interval(differences: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of paired differences between seeds and Student's interval, conditional on the held-out prompts.

    Args:
        differences: one per seed, at least two, finite.
        confidence: nominal coverage, in (0, 1).

    Raises:
        ScoresError: fewer than two seeds, or a value is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        raise ScoresError(f"an interval over seeds needs at least two finite differences, got {list(differences)}")
    mean, half = float(values.mean()), 0.0
    if values.std() > 0:
        from scipy import stats

        half = float(stats.sem(values) * stats.t.ppf((1 + confidence) / 2, len(values) - 1))
    return Interval(mean, mean - half, mean + half, "seeds", f"over {len(values)} seeds, on these prompts")


def wording(interval: Interval, better: Better | None = "higher") -> str:
    """The words that an interval earns: "no difference shown" where it includes zero.

    `better` is the direction that counts as better; None says only "higher by" or "lower by".
    """
    if interval.includes_zero:
        return "no difference shown"
    direction = "higher" if interval.estimate > 0 else "lower"
    word = direction if better is None else "better" if direction == better else "worse"
    digits = decimals(interval.estimate, interval.low, interval.high)
    return f"{word} by {abs(interval.estimate):.{digits}f}"


def decimals(*values: float) -> int:
    """Decimal places that show the largest magnitude of `values` with three significant digits (0 to 6)."""
    largest = max((abs(value) for value in values), default=0.0)
    return min(6, max(0, 2 - math.floor(math.log10(largest)))) if largest > 0 else 3


def resampled(rng: np.random.Generator, units: int, resamples: int) -> NDArray[np.float64]:
    """``(resamples, units)``: how often a draw with replacement takes each unit, as shares that sum to 1."""
    return rng.multinomial(units, np.full(units, 1 / units), size=resamples) / units


def _crossed(
    seed_weights: NDArray[np.float64], values: NDArray[np.float64], prompt_weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    # einsum without a contraction path runs no BLAS: the sums do not depend on the number of threads.
    return np.einsum("bs,sp,bp->b", seed_weights, values, prompt_weights)
