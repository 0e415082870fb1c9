"""What came of two runs: their training curves and their held-out scores, B against A."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from vipo.config.run import Config
from vipo.evaluation.left_out import left_out, on_common_samples
from vipo.evaluation.means import mean_score
from vipo.evaluation.statistics import Better, independent_difference, wording
from vipo.reporting.inputs import read_rows, read_scores
from vipo.reporting.runs import RunRecords, configured_difference, measured_columns, trained_direction


@dataclass(frozen=True)
class MetricDifference:
    """A training metric at each run's last update; None where a run does not have it."""

    metric: str
    a: float | None
    b: float | None


@dataclass(frozen=True)
class Training:
    """Both training curves.

    Attributes:
        updates: of each run.
        equal_updates: leading updates in which all metrics that both have are equal to the last bit.
        same_weights: whether the final weights are; None where a run has none here.
        metrics: of the last update.
    """

    updates: tuple[int, int]
    equal_updates: int
    same_weights: bool | None
    metrics: tuple[MetricDifference, ...]


@dataclass(frozen=True)
class ScoreDifference:
    """Means of a held-out score and B minus A with its interval.

    Attributes:
        better: the direction in which it was trained.
        left_out: samples that one of them has no score of.
    """

    column: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    better: Better | None
    verdict: str
    left_out: int


@dataclass(frozen=True)
class Evaluation:
    """Held-out scores of the final weights.

    Attributes:
        unpaired: why samples cannot be paired; None where both runs drew the same prompts and noise.
        confidence: of the intervals, A's.
        note: what the intervals are conditional on.
        scores: one per score that both runs have.
        missing: scores that one run alone has, or that fewer than two prompts have of both.
    """

    unpaired: str | None
    confidence: float
    note: str
    scores: tuple[ScoreDifference, ...]
    missing: tuple[str, ...]


def compare_training(a: RunRecords, b: RunRecords) -> Training | None:
    """Both curves; None where a run has no metrics here.

    Raises:
        ReportError: metrics are malformed.
    """
    paths = [run.folder / "metrics.jsonl" for run in (a, b)]
    if not all(path.is_file() for path in paths):
        return None
    left, right = (read_rows(path).to_dict("records") for path in paths)
    pairs = [(_values(row), _values(other)) for row, other in zip(left, right, strict=False)]
    equal = next((number for number, (row, other) in enumerate(pairs) if _disagree(row, other)), len(pairs))
    ends = [_values(rows[-1]) for rows in (left, right)]
    names = [name for name in dict.fromkeys([*ends[0], *ends[1]]) if name != "update"]
    metrics = tuple(MetricDifference(name, ends[0].get(name), ends[1].get(name)) for name in names)
    weights = [run.weights for run in (a, b)]
    same = weights[0] == weights[1] if all(weights) else None
    return Training((len(left), len(right)), equal, same, metrics)


def _values(row: Mapping[Any, Any]) -> dict[str, float]:
    # A metric that a run has in some updates only is missing in the others.
    return {str(name): float(value) for name, value in row.items() if not pd.isna(value)}


def _disagree(row: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return any(row[name] != other[name] for name in row.keys() & other.keys())


def compare_evaluation(a: RunRecords, b: RunRecords) -> Evaluation | None:
    """Held-out scores of both; None where a run has none here.

    Raises:
        ReportError: scores are malformed.
        ScoresError: they have doubled or missing pairs.
    """
    if not (a.is_evaluated and b.is_evaluated):
        return None
    tables = [read_scores(run.evaluated / "scores.parquet", run.config) for run in (a, b)]
    finals = [table[table["final"]] for table in tables]
    # Both sides may be of one run's name.
    both, lost = on_common_samples(pd.concat(finals, keys=("a", "b"), join="inner"))
    left, right = (both[both.index.get_level_values(0) == side] for side in ("a", "b"))
    unpaired = _unpaired(a.config, b.config, left, right)
    settings = a.config.evaluation
    columns = [set(measured_columns(table)) for table in finals]
    rows, note = [], ""
    for column in measured_columns(both):
        if unpaired is None:
            interval = configured_difference(right, left, column, settings)
        else:
            interval = independent_difference(right, left, column, confidence=settings.confidence)
        better, note = trained_direction(column, a.config, b.config), interval.note
        rows.append(
            ScoreDifference(
                column,
                mean_score(left, column),
                mean_score(right, column),
                interval.estimate,
                interval.low,
                interval.high,
                better,
                wording(interval, better),
                left_out(both, column),
            )
        )
    missing = tuple(sorted((columns[0] ^ columns[1]) | set(lost)))
    return Evaluation(unpaired, settings.confidence, note, tuple(rows), missing)


def _unpaired(a: Config, b: Config, left: pd.DataFrame, right: pd.DataFrame) -> str | None:
    pairs = [set(zip(table["prompt_id"], table["sample"], strict=True)) for table in (left, right)]
    if pairs[0] != pairs[1]:
        return (
            f"other prompts or samples: {len(pairs[0])} in A, {len(pairs[1])} in B, {len(pairs[0] & pairs[1])} in both"
        )
    if a.evaluation.seed != b.evaluation.seed:
        return f"other noise: evaluation.seed {a.evaluation.seed} in A, {b.evaluation.seed} in B"
    if (a.generator.family, a.evaluated.sample_shape) != (b.generator.family, b.evaluated.sample_shape):
        return "other noise: the generators' family or size differs"
    return None
