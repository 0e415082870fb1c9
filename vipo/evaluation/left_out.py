"""Samples without a score: a comparison leaves them out of that metric, in all runs alike, and tells how many.

A reward may have no score of a sample (a judge that does not answer, a detector that finds nothing). Runs are compared
on the samples that all of them have a score of: what one lacks is left out of every one, so that a mean is never over
easier prompts than the one beside it.
"""

import numpy as np
import pandas as pd

_PAIR = ["prompt_id", "sample"]


def on_common_samples(scores: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Scores where each metric is missing for the same samples in every run and update.

    Args:
        scores: rows of all runs that are compared, as in `scores.parquet`; a missing score is NaN.

    Returns:
        The rows, the very same where nothing is missing. And metrics that fewer than two prompts are left of, which are
        no columns any more.
    """
    found, lost = scores, []
    pairs = pd.MultiIndex.from_frame(scores[_PAIR])
    for column in (str(name) for name in scores.columns if str(name).startswith("reward/")):
        missing = scores[column].isna().to_numpy()
        if not missing.any():
            continue
        without = pairs.isin(pairs[missing])
        if scores.loc[~without, "prompt_id"].nunique() < 2:
            lost.append(column)
        found = found.assign(**{column: scores[column].where(~without, np.nan)})
    return found.drop(columns=lost), tuple(lost)


def left_out(scores: pd.DataFrame, column: str) -> int:
    """How many of the held-out samples have no score of `column` in one of the runs of these rows, or in several."""
    return len(scores.loc[scores[column].isna(), _PAIR].drop_duplicates())


def told(scores: pd.DataFrame, column: str) -> str:
    """`left_out` in words; empty where that is 0."""
    count = left_out(scores, column)
    return f"{count} of {len(scores[_PAIR].drop_duplicates())} samples have no score and are left out" if count else ""
