"""Registered measures of training (docs/registered.md): areas under held-out curves, paired by seed, and the rule.

Pure functions of the rows of `scores.parquet`. Intervals are over seeds, conditional on the held-out prompts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from vipo.config.registered import RegisteredConfig
from vipo.evaluation.comparison import holm
from vipo.evaluation.matched import evaluation_curves, matched_curves
from vipo.evaluation.means import ScoresError
from vipo.evaluation.statistics import seed_interval

EQUAL_UPDATES, EQUAL_CHANGE = "area at equal updates", "area at equal change"
#: The measures that decide; a candidate passes by both.
DECIDING = (EQUAL_UPDATES, EQUAL_CHANGE)


@dataclass(frozen=True)
class Verdict:
    """What the rule says of one family of tests.

    Attributes:
        passed: candidates with both measures above zero at the level, after Holm's correction; none where a control
            passes the test too.
        leads: of those, the one with the largest measure at equal change.
    """

    passed: tuple[str, ...]
    leads: str | None


@dataclass(frozen=True)
class Analysis:
    """All registered measures of an experiment.

    Attributes:
        runs: one row an arm, seed and measure: `arm`, `reference`, `seed`, `measure`, `common_change` (the largest that
            both runs reached), `value`, `reference_value`. Areas are less the base's reward.
        tests: one row an arm and measure: `role`, `arm`, `reference`, `measure`, `seeds`, `mean`, `reference_mean`,
            `difference`, `low`, `high` (Student's interval), `p` (two-sided) and `holm` (of tests that decide; else
            missing).
        controls: controls that pass the test themselves, by uncorrected p.
        families: the verdict on each.
        learned: arms and references whose mean area at equal updates is above zero: the reward rose above the base's.
    """

    runs: pd.DataFrame
    tests: pd.DataFrame
    controls: tuple[str, ...]
    families: dict[str, Verdict]
    learned: tuple[str, ...]

    def decision(self) -> dict[str, Any]:
        """The rule's outcome as plain JSON values."""
        families = {name: asdict(verdict) for name, verdict in self.families.items()}
        return {"learned": list(self.learned), "controls_that_pass": list(self.controls), "families": families}


def area_over_updates(updates: Sequence[float], rewards: Sequence[float]) -> float:
    """Mean height over updates of the curve through the points (trapezoids), less its first point.

    Args:
        updates: rising, two or more.
        rewards: at each.
    """
    x, y = np.asarray(updates, dtype=np.float64), np.asarray(rewards, dtype=np.float64)
    return float(np.trapezoid(y, x) / (x[-1] - x[0]) - y[0])


def area_over_change(changes: Sequence[float], rewards: Sequence[float], level: float) -> float:
    """Mean reward over all sizes of change up to `level`, each read where the curve first reaches it, less the start's.

    Where the change falls back and rises again, the curve's part below what it had reached does not count.

    Args:
        changes: size of change at each evaluated update, the base's first.
        rewards: at each.
        level: above the first change, at most the largest.

    Raises:
        ValueError: the level is not in that range.
    """
    reached = changes[0]
    if not reached < level <= max(changes):
        raise ValueError(f"level {level} is not above {reached} and at most {max(changes)}")
    area = 0.0
    for (left, first), (right, last) in pairwise(zip(changes, rewards, strict=True)):
        end = min(right, level)
        if end > reached:
            slope = (last - first) / (right - left)
            middle = (reached + end) / 2
            area += (end - reached) * (first + slope * (middle - left))
            reached = end
    return area / (level - changes[0]) - rewards[0]


def analyse(scores: pd.DataFrame, rule: RegisteredConfig, confidence: float) -> Analysis:
    """Measures, tests and verdict that `rule` fixes.

    Args:
        scores: rows of all runs, the base at update 0 among them.
        rule: what is compared with what.
        confidence: of the intervals; tests are at 1 - confidence, two-sided, and pass above zero alone.

    Raises:
        ScoresError: a column is missing, runs were evaluated at other updates or on other samples than the first, or a
            run never changed a picture.
    """
    columns = list(dict.fromkeys((rule.reward, rule.change, *rule.side_effects)))
    if missing := [name for name in columns if name not in scores]:
        raise ScoresError(f"registered: no score column {', '.join(missing)}; there are {', '.join(scores.columns)}")
    _check_alike(scores)
    curves = evaluation_curves(scores, columns, per_seed=True)
    by_run = {(str(arm), int(str(seed))): own for (arm, seed), own in curves.groupby(["arm", "seed"], sort=False)}
    runs: list[dict[str, Any]] = []
    for arm, reference in dict.fromkeys((arm, reference) for _, arm, reference in rule.pairs()):
        matched = matched_curves(curves, (arm, reference), rule.change, rule.side_effects)
        points: Mapping[Any, Any] = matched.set_index(["arm", "seed"]).to_dict("index")
        for seed in sorted(seed for name, seed in by_run if name == arm):
            if (arm, seed) not in points:
                raise ScoresError(f"registered: {arm} or {reference} of seed {seed} never changed a picture")
            ours, theirs = by_run[arm, seed], by_run[reference, seed]
            level = float(points[arm, seed]["level"])
            values: dict[str, tuple[float, ...]] = {
                EQUAL_UPDATES: tuple(
                    area_over_updates(own["update"].tolist(), own[rule.reward].tolist()) for own in (ours, theirs)
                ),
                EQUAL_CHANGE: tuple(
                    area_over_change(own[rule.change].tolist(), own[rule.reward].tolist(), level)
                    for own in (ours, theirs)
                ),
            }
            for name in (rule.change, *rule.side_effects):
                values[f"{name} after the last update"] = tuple(float(own[name].iloc[-1]) for own in (ours, theirs))
            for name in rule.side_effects:
                values[f"{name} at equal change"] = tuple(float(points[own, seed][name]) for own in (arm, reference))
            for measure, (value, other) in values.items():
                row = {"arm": arm, "reference": reference, "seed": seed, "measure": measure, "common_change": level}
                runs.append({**row, "value": value, "reference_value": other})
    table = pd.DataFrame(runs)
    tests = _tests(table, rule, confidence)

    def passing(role: str, arms: Iterable[str], p_value: str) -> tuple[str, ...]:
        own = tests[tests["role"] == role]
        return tuple(arm for arm in arms if _passes(own[own["arm"] == arm], p_value, 1 - confidence))

    controls = passing("control", rule.controls, "p")
    families = {}
    for name, pairs in rule.families.items():
        own = tests[tests["role"] == name]
        passed = () if controls else passing(name, pairs, "holm")
        change = own[own["measure"] == EQUAL_CHANGE].set_index("arm")["difference"]
        families[name] = Verdict(passed, max(passed, key=lambda arm: float(change[arm])) if passed else None)
    areas = tests[tests["measure"] == EQUAL_UPDATES]
    rises = dict(zip(areas["reference"], areas["reference_mean"], strict=True))
    rises |= dict(zip(areas["arm"], areas["mean"], strict=True))
    learned = tuple(str(arm) for arm, rise in rises.items() if float(rise) > 0)
    return Analysis(table, tests, controls, families, learned)


def _check_alike(scores: pd.DataFrame) -> None:
    """Every trained run has the same updates, and every update the base's prompts and samples."""
    base = scores[scores["update"] == 0]
    pairs = set(zip(base["prompt_id"], base["sample"], strict=True))
    trained = scores[scores["update"] > 0]
    updates: dict[str, list[int]] = {}
    for (run, update), rows in trained.groupby(["run", "update"], sort=True):
        updates.setdefault(str(run), []).append(int(str(update)))
        if set(zip(rows["prompt_id"], rows["sample"], strict=True)) != pairs:
            raise ScoresError(f"registered: {run} at update {update} has other prompts or samples than the base")
    first = next(iter(updates), "")
    for run, own in updates.items():
        if own != updates[first]:
            raise ScoresError(f"registered: {run} was evaluated at updates {own}, {first} at {updates[first]}")


def _tests(runs: pd.DataFrame, rule: RegisteredConfig, confidence: float) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for role, arm, reference in rule.pairs():
        own = runs[(runs["arm"] == arm) & (runs["reference"] == reference)]
        for measure, values in own.groupby("measure", sort=False):
            differences = (values["value"] - values["reference_value"]).tolist()
            interval = seed_interval(differences, confidence)
            rows.append(
                {
                    "role": role,
                    "arm": arm,
                    "reference": reference,
                    "measure": measure,
                    "seeds": len(values),
                    "mean": float(values["value"].mean()),
                    "reference_mean": float(values["reference_value"].mean()),
                    "difference": interval.estimate,
                    "low": interval.low,
                    "high": interval.high,
                    "p": _two_sided(differences),
                    "holm": float("nan"),
                }
            )
    table = pd.DataFrame(rows)
    for _, family in table[table["role"].isin(list(rule.families)) & table["measure"].isin(DECIDING)].groupby(
        ["role", "measure"]
    ):
        table.loc[family.index, "holm"] = holm(family["p"].tolist())
    return table


def _two_sided(differences: Sequence[float]) -> float:
    """Student's p of the mean difference; 1 where all are zero, 0 where all are one other number."""
    from scipy import stats

    values = np.asarray(differences, dtype=np.float64)
    if np.ptp(values) == 0:
        return float(values[0] == 0)
    return float(stats.ttest_1samp(values, 0).pvalue)


def _passes(tests: pd.DataFrame, p_value: str, level: float) -> bool:
    deciding = tests[tests["measure"].isin(DECIDING)]
    return bool(((deciding["difference"] > 0) & (deciding[p_value] < level)).all())
