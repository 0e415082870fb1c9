"""What the study shows: arms compared at equal updates, equal reward and equal change, and the decision on the default.

Pure functions of the rows of `scores.parquet`. Intervals are over seeds, conditional on the held-out prompts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from vipo.config.models import StudyConfig
from vipo.evaluation.statistics import Interval, ScoresError, matched_pairs, seed_interval

#: Share of a picture's change that falls on the base picture's object: `change/foreground` over both parts' sum.
OBJECT_SHARE = "change/object_share"


@dataclass(frozen=True)
class Decision:
    """The outcome of a study's one decision.

    Attributes:
        chosen: the candidate with the largest difference to the reference on the choosing seeds.
        choosing: every candidate's difference on those seeds.
        confirmed: the chosen one's difference on the fresh seeds.
        default: the arm that the decision makes the default: the chosen one, or the reference where the interval of
            the fresh seeds does not lie above zero.
    """

    chosen: str
    choosing: dict[str, Interval]
    confirmed: Interval
    default: str

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def compare_over_seeds(
    scores: pd.DataFrame, reference: str, reward: str, columns: Sequence[str], confidence: float
) -> pd.DataFrame:
    """Every trained arm against `reference` at matched updates, matched reward and matched change, over common seeds.

    Args:
        scores: rows of all runs, the base at update 0 among them.
        reference: arm.
        reward: the trained reward's column.
        columns: what is compared; where the change is split into foreground and background, `OBJECT_SHARE` as well.
        confidence: of the intervals.

    Returns:
        One row per arm, matching and column: `arm`, `matched` ("updates", "reward", "change"), `column`, `seeds`,
        `skipped` (common seeds at which an arm never moved past the base), `mean`, `reference_mean`, `difference`,
        `low`, `high`. A column is not compared where it is the one held equal.
    """
    trained = scores[scores["update"] > 0]
    rows: list[dict[str, Any]] = []
    for arm in (name for name in trained["arm"].unique() if name != reference):
        both = trained[trained["arm"].isin((arm, reference))].groupby("seed")["arm"].nunique()
        seeds = both.index[both == 2].tolist()
        for matched, on in (("updates", None), ("reward", reward), ("change", "change/total")):
            wanted = [name for name in columns if name != on]
            pairs = (
                _at_the_end(trained, arm, reference, seeds, wanted)
                if on is None
                else matched_pairs(scores, arm, reference, on, wanted)
            )
            for column in [*wanted, *_add_object_share(pairs)]:
                if len(pairs) < 2:
                    continue
                interval = seed_interval(list(pairs[column] - pairs[f"{column}_reference"]), confidence)
                rows.append(
                    {
                        "arm": arm,
                        "matched": matched,
                        "column": column,
                        "seeds": len(pairs),
                        "skipped": len(seeds) - len(pairs),
                        "mean": float(pairs[column].mean()),
                        "reference_mean": float(pairs[f"{column}_reference"].mean()),
                        "difference": interval.estimate,
                        "low": interval.low,
                        "high": interval.high,
                    }
                )
    names = "arm matched column seeds skipped mean reference_mean difference low high"
    return pd.DataFrame(rows, columns=names.split())


def _add_object_share(pairs: pd.DataFrame) -> list[str]:
    parts = ["change/foreground", "change/background"]
    if not set(parts) <= set(pairs.columns):
        return []
    for suffix in ("", "_reference"):
        inside, outside = (pairs[f"{name}{suffix}"] for name in parts)
        pairs[f"{OBJECT_SHARE}{suffix}"] = inside / (inside + outside)
    return [OBJECT_SHARE]


def _at_the_end(
    trained: pd.DataFrame, arm: str, reference: str, seeds: Sequence[int], columns: Sequence[str]
) -> pd.DataFrame:
    final = trained[trained["final"]].groupby(["arm", "seed"])[list(columns)].mean()
    ours, theirs = (final.xs(name).reindex(list(seeds)) for name in (arm, reference))
    return ours.join(theirs.add_suffix("_reference")).reset_index()


def decide(scores: pd.DataFrame, study: StudyConfig, confidence: float) -> Decision:
    """Choose on one half of the seeds, confirm on the other, by the metric that the configuration fixed.

    Raises:
        ScoresError: a candidate and the reference share fewer than two seeds of a half at which both moved.
    """

    def difference(arm: str, seeds: Sequence[int]) -> Interval:
        pairs = matched_pairs(scores, arm, study.reference, study.matched_on, [study.metric])
        own = pairs[pairs["seed"].isin(seeds)]
        if len(own) < 2:
            raise ScoresError(
                f"study: {arm} and {study.reference} have {len(own)} of the seeds {list(seeds)} in common"
            )
        return seed_interval(list(own[study.metric] - own[f"{study.metric}_reference"]), confidence)

    choosing = {arm: difference(arm, study.choose_seeds) for arm in study.candidates}
    chosen = max(choosing, key=lambda arm: choosing[arm].estimate)
    confirmed = difference(chosen, study.confirm_seeds)
    return Decision(chosen, choosing, confirmed, chosen if confirmed.low > 0 else study.reference)


def clip_table(
    scores: pd.DataFrame, metrics: pd.DataFrame, cells: pd.DataFrame, columns: Sequence[str]
) -> pd.DataFrame:
    """The clip study: what each gate clipped and where its runs ended.

    Args:
        scores: rows of all runs.
        metrics: training metrics of all runs: `arm`, `seed`, `update`, ``clip/share``.
        cells: one row per arm: `arm`, `ratio`, `scope`, `side`, `range`.
        columns: final scores to average.

    Returns:
        `cells` with `seeds`, `clipped` (mean share over updates and seeds) and the mean of each column, its standard
        deviation over seeds as ``<column>_std``.
    """
    final = scores[scores["final"] & (scores["update"] > 0)].groupby(["arm", "seed"])[list(columns)].mean()
    rows = []
    for cell in cells.to_dict("records"):
        own = final.loc[cell["arm"]]
        clipped = metrics.loc[metrics["arm"] == cell["arm"], "clip/share"].mean()
        spread = {f"{name}_std": float(own[name].std()) for name in columns}
        rows.append({**cell, "seeds": len(own), "clipped": float(clipped), **own.mean().to_dict(), **spread})
    return pd.DataFrame(rows)
