"""What the study shows: arms compared at equal updates, equal reward and equal change, and the decision on the default.

Pure functions of the rows of `scores.parquet`. Intervals are over seeds, conditional on the held-out prompts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from vipo.config.arms import StudyConfig
from vipo.evaluation.matched import matched_arms
from vipo.evaluation.means import ScoresError
from vipo.evaluation.statistics import Interval, seed_interval

#: Change of a pixel on the base picture's object over the sum of that and a background pixel's: 0.5 is an even change.
SELECTIVITY = "change/selectivity"


@dataclass(frozen=True)
class Decision:
    """The outcome of a study's one decision.

    Attributes:
        chosen: the candidate with the largest difference to the reference on the choosing seeds.
        choosing: every candidate's difference on those seeds.
        confirmed: the chosen one's difference on the fresh seeds.
        default: the arm that the decision makes the default: the chosen one, or the reference where the interval of
            the fresh seeds does not lie above zero.
        skipped: seeds that could not be compared, because an arm never moved past the base.
    """

    chosen: str
    choosing: dict[str, Interval]
    confirmed: Interval
    default: str
    skipped: tuple[int, ...]

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
        columns: what is compared; where the change is split into foreground and background, `SELECTIVITY` as well.
        confidence: of the intervals.

    Returns:
        One row per arm, matching and column: `arm`, `matched` ("updates", "reward", "change"), `column`, `seeds`,
        `skipped` (common seeds at which an arm never moved past the base), `level` (mean over seeds of what is held
        equal; missing for updates), `mean`, `reference_mean`, `difference`, `low`, `high`. A column is not compared
        where it is the one held equal.
    """
    trained = scores[scores["update"] > 0]
    rows: list[dict[str, Any]] = []
    for arm in (name for name in trained["arm"].unique() if name != reference):
        common = trained[trained["arm"].isin((arm, reference))].groupby("seed")["arm"].nunique()
        seeds = common.index[common == 2].tolist()
        for matched, on in (("updates", None), ("reward", reward), ("change", "change/total")):
            wanted = [name for name in columns if name != on]
            if on is None:
                last = trained[trained["final"] & trained["arm"].isin((arm, reference)) & trained["seed"].isin(seeds)]
                points = last.groupby(["arm", "seed"], as_index=False)[wanted].mean()
            else:
                points = matched_arms(scores, (arm, reference), on, wanted)
            points = _with_selectivity(points)
            ours, theirs = (points[points["arm"] == name].set_index("seed") for name in (arm, reference))
            if len(ours) < 2:
                continue
            for column in [*wanted, *(name for name in [SELECTIVITY] if name in points)]:
                interval = seed_interval(list(ours[column] - theirs[column]), confidence)
                rows.append(
                    {
                        "arm": arm,
                        "matched": matched,
                        "column": column,
                        "seeds": len(ours),
                        "skipped": len(seeds) - len(ours),
                        "level": float(ours["level"].mean()) if on is not None else None,
                        "mean": float(ours[column].mean()),
                        "reference_mean": float(theirs[column].mean()),
                        "difference": interval.estimate,
                        "low": interval.low,
                        "high": interval.high,
                    }
                )
    names = "arm matched column seeds skipped level mean reference_mean difference low high"
    return pd.DataFrame(rows, columns=names.split())


def _with_selectivity(points: pd.DataFrame) -> pd.DataFrame:
    parts = ["change/foreground", "change/background"]
    if not set(parts) <= set(points.columns):
        return points
    return points.assign(**{SELECTIVITY: points[parts[0]] / (points[parts[0]] + points[parts[1]])})


def decide(scores: pd.DataFrame, study: StudyConfig, confidence: float) -> Decision:
    """Choose on one half of the seeds, confirm on the other, by the metric that the configuration fixed.

    Candidates and reference are read at one level for each seed, the highest that all of them reached: a candidate that
    moves less is not read where differences are smaller.

    Raises:
        ScoresError: fewer than two seeds of a half can be compared.
    """
    arms = (study.reference, *study.candidates)
    points = matched_arms(scores, arms, study.matched_on, [study.metric])
    table = points.pivot(index="seed", columns="arm", values=study.metric)

    def difference(arm: str, seeds: Sequence[int]) -> Interval:
        own = table[table.index.isin(seeds)]
        if len(own) < 2:
            raise ScoresError(f"study: of the seeds {list(seeds)}, {len(own)} can be compared for {', '.join(arms)}")
        return seed_interval(list(own[arm] - own[study.reference]), confidence)

    choosing = {arm: difference(arm, study.choose_seeds) for arm in study.candidates}
    chosen = max(choosing, key=lambda arm: choosing[arm].estimate)
    confirmed = difference(chosen, study.confirm_seeds)
    wanted = (*study.choose_seeds, *study.confirm_seeds)
    return Decision(
        chosen,
        choosing,
        confirmed,
        chosen if confirmed.low > 0 else study.reference,
        tuple(seed for seed in wanted if seed not in table.index),
    )


def clip_table(
    scores: pd.DataFrame, metrics: pd.DataFrame, cells: pd.DataFrame, columns: Sequence[str]
) -> pd.DataFrame:
    """The clip study: what each gate clipped and where its runs ended.

    Args:
        scores: rows of all runs.
        metrics: training metrics of all runs: `arm`, `update`, ``clip/share``.
        cells: one row per arm: `arm`, `ratio`, `gate` and its options.
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
