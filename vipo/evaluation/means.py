"""Means of scores: always over samples, then prompts, then seeds.

All functions are pure and take the rows of `scores.parquet` (one row per run, update, prompt and sample). Arms are
paired by ``(prompt_id, sample)``: the evaluation gives every arm the same prompts and noise. A sample without a score
(NaN) is left out, with its like of every seed; arms are compared on samples that both have
(`vipo.evaluation.left_out`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vipo.errors import VipoError

_NAMED_PAIRS = 5


class ScoresError(VipoError):
    """Scores that cannot be compared; the message names the arm and the rows."""


@dataclass(frozen=True)
class Side:
    """One column of one arm at one update.

    Attributes:
        label: of the arm, for messages.
        trained: whether it is of an update after the base.
        seeds: sorted.
        pairs: (prompt_id, sample), sorted; every one has a score for every seed, and a finite one.
        prompts: sorted, of `pairs`.
        means: ``(seeds, prompts)``, over samples.
    """

    label: str
    trained: bool
    seeds: pd.Index
    pairs: pd.Index
    prompts: pd.Index
    means: NDArray[np.float64]


def sides_of(scores: pd.DataFrame, columns: Sequence[str]) -> dict[str, Side]:
    """One arm at one update, by column.

    Raises:
        ScoresError: a column is missing, there are no rows, a pair is doubled or missing of a seed (named), a value is
            infinite, or no sample has a score.
    """
    label = _arm_label(scores)
    keys, wanted = ["seed", "prompt_id", "sample"], ", ".join(columns)
    missing = [name for name in (*keys, "update", *columns) if name not in scores]
    if missing:
        raise ScoresError(
            f"scores of {label}: no column {', '.join(map(repr, missing))}; there are {list(scores.columns)}"
        )
    if scores.empty:
        raise ScoresError(f"scores of {label}: no rows to compare in {wanted}")
    doubled = scores[scores.duplicated(keys, keep=False)]
    if len(doubled):
        raise ScoresError(f"scores of {label}: several rows for {_named(doubled[keys])}; select one update of one arm")
    for column in columns:
        broken = scores[np.isinf(scores[column].to_numpy(dtype=np.float64))]
        if len(broken):
            raise ScoresError(f"scores of {label}: {column} is infinite for {_named(broken[keys])}")
    # All columns at once: a pivot's time is the same for one.
    wide = scores.pivot(index="seed", columns=["prompt_id", "sample"], values=list(dict.fromkeys(columns)))
    wide = wide.sort_index(axis=0).sort_index(axis=1)
    pairs = wide[columns[0]].columns if len(columns) else wide.columns
    if len(columns) and len(wide) * len(pairs) > len(scores):
        cells = pd.MultiIndex.from_tuples([(seed, *pair) for seed in wide.index for pair in pairs], names=keys)
        absent = cells[~cells.isin(pd.MultiIndex.from_frame(scores[keys]))].to_frame(index=False)
        raise ScoresError(f"scores of {label}: no row for {_named(absent)}, which other seeds have")
    known = {column: ~np.isnan(wide[column].to_numpy(dtype=np.float64)).any(axis=0) for column in columns}
    for column, there in known.items():
        if not there.any():
            raise ScoresError(f"scores of {label}: no sample has a score of {column} for every seed")
        if not there.all():
            wide.loc[:, [(column, *pair) for pair in pairs[~there]]] = np.nan
    means = wide.T.groupby(level=[0, "prompt_id"], sort=True).mean()
    trained = bool((scores["update"] > 0).any())
    sides = {}
    for column, there in known.items():
        # Nothing is taken out of a whole one: its layout decides the last digit of a sum.
        own = means.loc[column].T if there.all() else means.loc[column].dropna().T
        kept, values = pairs[there], own.to_numpy(dtype=np.float64)
        sides[column] = Side(label, trained, wide.index, kept, own.columns, values)
    return sides


def require_same_pairs(ours: Side, theirs: Side) -> None:
    """Raise ScoresError, which names some of them, where one side has pairs that the other has not."""
    for have, want in ((ours, theirs), (theirs, ours)):
        absent = want.pairs.difference(have.pairs)
        if len(absent):
            raise ScoresError(
                f"scores of {have.label}: no row for {_named(absent.to_frame(index=False))}, so {ours.label} and "
                f"{theirs.label} cannot be paired; evaluate both on the same prompts and samples"
            )


def _named(pairs: pd.DataFrame) -> str:
    shown = [
        "(" + ", ".join(f"{key} {value}" for key, value in row.items()) + ")"
        for row in pairs.head(_NAMED_PAIRS).to_dict("records")
    ]
    more = len(pairs) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def paired_means(scores: pd.DataFrame, reference: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Differences of two arms by prompt, a column each, over samples and seeds; NaN of a prompt that is left out.

    Raises:
        ScoresError: as `paired_difference`.
    """
    ours, theirs = sides_of(scores, columns), sides_of(reference, columns)
    for column in columns:
        require_same_pairs(ours[column], theirs[column])
    return pd.DataFrame(
        {
            column: pd.Series(ours[column].means.mean(axis=0) - theirs[column].means.mean(axis=0), ours[column].prompts)
            for column in columns
        }
    )


def mean_score(scores: pd.DataFrame, column: str) -> float:
    """Mean of `column` over samples, then prompts, then seeds.

    Raises:
        ScoresError: a pair is doubled, a seed lacks pairs of another, a value is infinite, or no sample has a score.
    """
    return mean_scores(scores, [column])[column]


def mean_scores(scores: pd.DataFrame, columns: Sequence[str]) -> dict[str, float]:
    """`mean_score` of several columns, by column.

    Raises:
        ScoresError: as `mean_score`.
    """
    return {column: float(side.means.mean()) for column, side in sides_of(scores, columns).items()}


def trained_rows(scores: pd.DataFrame) -> pd.DataFrame:
    """Rows after the base."""
    return scores[scores["update"] > 0]


def _arm_label(scores: pd.DataFrame) -> str:
    return "/".join(map(str, scores["arm"].unique())) if "arm" in scores else "the arm"
