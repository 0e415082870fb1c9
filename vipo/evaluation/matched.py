"""Curves over updates, and comparisons at matched reward or change: a faster arm read where the slowest one got to.

Pure functions of the rows of `scores.parquet`, as in `vipo.evaluation.means`.
"""

import math
from collections.abc import Sequence
from statistics import median_low
from typing import Any

import numpy as np
import pandas as pd

from vipo.evaluation.means import ScoresError, mean_scores, trained_rows
from vipo.evaluation.statistics import Better


def evaluation_curves(scores: pd.DataFrame, columns: Sequence[str], *, per_seed: bool = False) -> pd.DataFrame:
    """Mean scores over the evaluated updates, starting from the base at update 0.

    Args:
        scores: rows of all runs; arm ``base`` gives every curve's first point.
        columns: scores to average.
        per_seed: one curve per arm and seed instead of one per arm.

    Returns:
        `arm`, `seed` (per_seed only), `update` and `columns`, sorted by update within each curve.

    Raises:
        ScoresError: there is no row of the base.
    """
    base = scores[scores["update"] == 0]
    if base.empty:
        raise ScoresError("scores hold no row of the untrained base (update 0): every curve starts there")
    start = mean_scores(base, columns)
    keys = ["arm", "seed"] if per_seed else ["arm"]
    rows: list[dict[str, Any]] = []
    for key, curve in trained_rows(scores).groupby(keys, sort=False):
        identity = dict(zip(keys, key, strict=True))
        rows.append({**identity, "update": 0, **start})
        for update, point in curve.groupby("update", sort=True):
            rows.append({**identity, "update": update, **mean_scores(point, columns)})
    return pd.DataFrame(rows, columns=[*keys, "update", *columns])


def matched_reward(scores: pd.DataFrame, on: str, columns: Sequence[str], *, better: Better = "higher") -> pd.DataFrame:
    """All arms at one common level of `on` (a reward, or a size of change), by linear interpolation.

    The level is the lower median of the best values of those arms that moved past the base, so at
    least half of them reach it. Each arm's curve over its evaluated updates is followed to where it
    first reaches the level, and `columns` are interpolated there. A curve that never does is marked,
    never extrapolated.

    Args:
        scores: rows of all runs, with the base at update 0.
        on: the column that is held equal.
        columns: the columns that are read off.
        better: the direction in which `on` moves away from the base.

    Returns:
        One row per arm (`seed` missing: its curve is the mean over seeds) and per arm and seed:
        `arm`, `seed`, `on`, `level`, `reached`, `update` and `columns`; not reached: missing values.
        `level` is missing where no arm moved past the base.

    Raises:
        ScoresError: as `evaluation_curves`.
    """
    sign = 1.0 if better == "higher" else -1.0
    wanted = [on, *(column for column in columns if column != on)]
    means = evaluation_curves(scores, wanted)
    start = sign * float(means[on].iloc[0]) if len(means) else math.nan
    best = (sign * means[means["update"] > 0].set_index("arm")[on]).groupby(level="arm").max()
    past = [float(value) for value in best if value > start]
    level = sign * median_low(past) if past else math.nan
    rows: list[dict[str, Any]] = []
    for curves in (means, evaluation_curves(scores, wanted, per_seed=True)):
        keys = [key for key in ("arm", "seed") if key in curves]
        for key, curve in curves.groupby(keys, sort=False):
            identity = dict(zip(keys, key, strict=True))
            found = _interpolated(curve, on, level, sign, ["update", *columns])
            rows.append({**identity, "on": on, "level": level, "reached": found is not None, **(found or {})})
    table = pd.DataFrame(rows, columns=["arm", "seed", "on", "level", "reached", "update", *columns])
    return table.astype({"seed": "Int64"})


def matched_arms(
    scores: pd.DataFrame, arms: Sequence[str], on: str, columns: Sequence[str], *, better: Better = "higher"
) -> pd.DataFrame:
    """Arms seed by seed at the highest level of `on` that all of them reached with that seed.

    Each seed's curve over its evaluated updates starts at the base and is followed to where it first reaches the level;
    `columns` are interpolated there. A faster arm is thus read where the slowest one got to.

    Args:
        scores: rows of all runs, with the base at update 0.
        arms: arms with common seeds.
        on: the column that is held equal.
        columns: the columns that are read off.
        better: the direction in which `on` moves away from the base.

    Returns:
        `arm`, `seed`, `level`, `update` and `columns`; one row per arm for each common seed at which all of them moved
        past the base.

    Raises:
        ScoresError: as `evaluation_curves`.
    """
    chosen = scores[scores["arm"].isin(arms) | (scores["update"] == 0)]
    curves = evaluation_curves(chosen, list(dict.fromkeys([on, *columns])), per_seed=True)
    return matched_curves(curves, arms, on, columns, better=better)


def matched_curves(
    curves: pd.DataFrame, arms: Sequence[str], on: str, columns: Sequence[str], *, better: Better = "higher"
) -> pd.DataFrame:
    """`matched_arms` from the curves of `evaluation_curves` (per seed), which serve many sets of arms."""
    sign = 1.0 if better == "higher" else -1.0
    read = ["update", *columns]
    curves = curves[curves["arm"].isin(arms)]
    rows: list[dict[str, Any]] = []
    for seed, together in curves.groupby("seed", sort=True):
        own = {str(arm): curve for arm, curve in together.groupby("arm", sort=False)}
        if len(own) < len(arms):
            continue
        level = sign * min(float((sign * curve[on]).max()) for curve in own.values())
        points = {arm: _interpolated(curve, on, level, sign, read) for arm, curve in own.items()}
        if all(points.values()):
            rows += [{"arm": arm, "seed": seed, "level": level, **(points[arm] or {})} for arm in arms]
    return pd.DataFrame(rows, columns=["arm", "seed", "level", *read])


def _interpolated(
    curve: pd.DataFrame, on: str, level: float, sign: float, columns: Sequence[str]
) -> dict[str, float] | None:
    heights = sign * curve[on].to_numpy(dtype=np.float64)
    at_least = np.flatnonzero(heights >= sign * level)
    if len(at_least) == 0 or at_least[0] == 0:
        return None
    after = int(at_least[0])
    share = (sign * level - heights[after - 1]) / (heights[after] - heights[after - 1])
    values = curve[list(columns)].to_numpy(dtype=np.float64)
    point = values[after - 1] + share * (values[after] - values[after - 1])
    return dict(zip(columns, map(float, point), strict=True))
