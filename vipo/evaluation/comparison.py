"""What a fixed set of prompts says beside means: categories, wins, all metrics at once.

Pure functions of the rows of `scores.parquet` (`vipo.evaluation.means`). A number that cannot be computed is
missing, and the table says why.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from vipo.evaluation.left_out import told
from vipo.evaluation.means import ScoresError, mean_scores, paired_means, trained_rows
from vipo.evaluation.statistics import resampled, tail_probability
from vipo.keys import keyed_seed


def by_category(scores: pd.DataFrame, categories: Mapping[str, Sequence[str]], columns: Sequence[str]) -> pd.DataFrame:
    """Final means of every arm on the prompts of each category.

    Args:
        scores: rows of all runs.
        categories: those of each prompt, by its id: it counts in each, and without one in none.
        columns: scores to average.

    Returns:
        `arm`, `category`, `prompts`, `columns` (missing where no sample of the category has a score) and `note`.
    """
    final = scores[scores["final"]].assign(category=lambda rows: rows["prompt_id"].map(categories)).explode("category")
    rows = []
    for (arm, category), own in final.dropna(subset="category").groupby(["arm", "category"], sort=True):
        means = mean_scores(own, [column for column in columns if own[column].notna().any()])
        note = "; ".join(f"{column}: {text}" for column in columns if (text := told(own, column)))
        prompts = own["prompt_id"].nunique()
        rows.append({"arm": arm, "category": category, "prompts": prompts, **means, "note": note})
    return pd.DataFrame(rows, columns=["arm", "category", "prompts", *columns, "note"])


def win_rates(scores: pd.DataFrame, columns: Sequence[str], reference: str = "base") -> pd.DataFrame:
    """How often an arm's final sample scores above the reference's of the same prompt and noise; a tie is half a win.

    Returns:
        `arm`, `reference`, `column`, `samples`, `wins`, `ties`, `rate` (in [0, 1]), `note`.

    Raises:
        ScoresError: there is no row of the reference, or an arm's sample has none there.
    """
    keys = ["prompt_id", "sample"]
    final = scores[scores["final"]]
    theirs = final[final["arm"] == reference]
    if theirs.empty:
        raise ScoresError(f"win rates: there is no final row of {reference!r}")
    means = theirs.groupby(keys)[list(columns)].mean()
    rows = []
    for arm, own in final[final["arm"] != reference].groupby("arm", sort=False):
        places = pd.MultiIndex.from_frame(own[keys])
        if not bool(places.isin(means.index).all()):
            raise ScoresError(f"win rates: samples of {arm} have no counterpart of {reference}")
        other = means.reindex(places)
        for column in columns:
            difference = own[column].to_numpy() - other[column].to_numpy()
            difference = difference[~np.isnan(difference)]
            wins, ties = int((difference > 0).sum()), int((difference == 0).sum())
            rate = (wins + ties / 2) / len(difference)
            note = told(pd.concat([own, theirs]), column)
            rows.append((arm, reference, column, len(difference), wins, ties, rate, note))
    return pd.DataFrame(rows, columns=["arm", "reference", "column", "samples", "wins", "ties", "rate", "note"])


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    """Holm's adjusted p-values (1979): rejecting those below alpha keeps the chance of any false one below alpha."""
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


def over_metrics(
    scores: pd.DataFrame,
    columns: Sequence[str],
    reference: str = "base",
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Every arm's final difference to the reference on all metrics together, corrected for how many there are.

    Prompts are resampled, the same draws for every metric, after averaging over seeds and samples. `p` is twice the
    smaller tail of the bootstrap at zero, with one added to both counts; `p_holm` is Holm's over the arm's metrics, and
    `low` to `high` is the interval at the level at which Holm's procedure tests the metric. Tails are expanded for few
    prompts, as in `vipo.evaluation.statistics.tail_probability`.

    Returns:
        `arm`, `reference`, `column`, `difference`, `low`, `high`, `p`, `p_holm`, `note`.

    Raises:
        ScoresError: as of `paired_difference`.
    """
    final, rows = scores[scores["final"]], []
    theirs = final[final["arm"] == reference]
    for arm, own in trained_rows(final).groupby("arm", sort=False):
        if arm == reference:
            continue
        if not columns:
            break
        differences = np.ascontiguousarray(paired_means(own, theirs, columns).to_numpy(dtype=np.float64))
        known = np.isfinite(differences)
        prompts = known.sum(axis=0)
        if prompts.min() < 2:
            raise ScoresError("one prompt has no spread to resample; evaluate at least 2 prompts")
        rng = np.random.default_rng(keyed_seed("bootstrap", seed))
        weights = resampled(rng, len(differences), resamples)
        # Without BLAS: the sums do not depend on the number of threads.
        draws = np.einsum("bp,pc->bc", weights, np.where(known, differences, 0))
        for place in np.flatnonzero(~known.all(axis=0)):
            # Means over the prompts that have a score; a draw without any of them is none.
            shares = np.einsum("bp,p->b", weights, known[:, place].astype(np.float64))
            draws[:, place] = np.divide(draws[:, place], shares, out=np.full(resamples, np.nan), where=shares > 0)
        below, above = (draws <= 0).sum(axis=0), (draws >= 0).sum(axis=0)
        made = (~np.isnan(draws)).sum(axis=0)
        tails = np.minimum(0.5, (np.minimum(below, above) + 1) / (made + 1))
        # As the interval is expanded, so is the tail: p is below 1 - confidence where the interval lies beside zero.
        p = 2 * special.stdtr(prompts - 1, special.ndtri(tails) * np.sqrt((prompts - 1) / prompts))
        ranks = np.argsort(np.argsort(p, kind="stable"), kind="stable")
        for number, (column, adjusted) in enumerate(zip(columns, holm(p), strict=True)):
            level = 1 - (1 - confidence) / (len(columns) - int(ranks[number]))
            tail = tail_probability(level, int(prompts[number]))
            low, high = np.quantile(draws[~np.isnan(draws[:, number]), number], [tail, 1 - tail])
            estimate = float(differences[known[:, number], number].mean())
            note = f"{prompts[number]} prompts, {len(columns)} metrics, conditional on these seeds"
            if text := told(pd.concat([own, theirs]), column):
                note += f"; {text}"
            rows.append((arm, reference, column, estimate, low, high, p[number], adjusted, note))
    return pd.DataFrame(
        rows, columns=["arm", "reference", "column", "difference", "low", "high", "p", "p_holm", "note"]
    )
