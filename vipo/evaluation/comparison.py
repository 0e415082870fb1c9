"""What a fixed set of prompts says beside means: categories, wins, all metrics at once, totals.

Pure functions of the rows of `scores.parquet` (`vipo.evaluation.statistics`). A number that cannot be computed is
missing, and the table says why.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from vipo.evaluation.left_out import told
from vipo.evaluation.statistics import (
    ScoresError,
    mean_scores,
    paired_means,
    resampled,
    tail_probability,
    trained_rows,
)
from vipo.keys import keyed_seed

#: Bounds that scale VBench's dimensions (its repository's constants, arXiv 2311.17982), where they are not 0 to 1.
_VBENCH_BOUNDS: Mapping[str, tuple[float, float]] = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
_VBENCH_QUALITY: Mapping[str, float] = {
    "subject_consistency": 1,
    "background_consistency": 1,
    "temporal_flickering": 1,
    "motion_smoothness": 1,
    "aesthetic_quality": 1,
    "imaging_quality": 1,
    "dynamic_degree": 0.5,
}
_VBENCH = "reward/vbench_"
_VBENCH_SEMANTIC = (
    "object_class",
    "multiple_objects",
    "human_action",
    "color",
    "spatial_relationship",
    "scene",
    "appearance_style",
    "temporal_style",
    "overall_consistency",
)


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


def set_totals(
    scores: pd.DataFrame, metadata: Mapping[str, Mapping[str, Any]], geneval: Sequence[str] = ()
) -> pd.DataFrame:
    """Numbers of a whole set: GenEval's overall score and VBench's total, of every arm's final samples.

    GenEval's is the mean over its tasks of the share of samples that are right (a score of 1; the task is the prompt's
    `tag`). VBench's is the mean of quality, weighed 4, and semantics, weighed 1, each a weighted mean of
    dimensions scaled to [0, 1] by its published bounds; a dimension is a reward called ``vbench_<dimension>``, on the
    prompts whose `dimension` names it.

    Args:
        scores: rows of all runs.
        metadata: of the prompts, by id.
        geneval: columns of GenEval's scores: those of another label have a total each, ``geneval (label)``.

    Returns:
        `arm`, `total`, `value` (missing where it cannot be computed) and `note`, which then says what is missing.
    """
    final = scores[scores["final"]]
    rows: list[dict[str, Any]] = []
    for arm, own in final.groupby("arm", sort=False):
        found = {_named_total(column): _geneval(own, column, metadata) for column in geneval or ("reward/geneval",)}
        for total, (value, note) in {**found, "vbench": _vbench(own, metadata)}.items():
            rows.append({"arm": arm, "total": total, "value": value, "note": note})
    return pd.DataFrame(rows, columns=["arm", "total", "value", "note"])


def _named_total(column: str) -> str:
    label = column.removeprefix("reward/")
    return "geneval" if label == "geneval" else f"geneval ({label})"


def _geneval(own: pd.DataFrame, column: str, metadata: Mapping[str, Mapping[str, Any]]) -> tuple[float | None, str]:
    if column not in own:
        return None, "not measured: evaluation.rewards has no geneval, or it scored too few samples"
    tags = own["prompt_id"].map(lambda prompt: metadata.get(prompt, {}).get("tag"))
    if bool(tags.isna().any()):
        return None, "not measured: prompts without a 'tag', which names GenEval's task"
    known = own[column].dropna()
    right = (known >= 1).groupby(tags[known.index]).mean()
    note = f"mean of {len(right)} tasks: {', '.join(map(str, right.index))}"
    if missing := sorted(set(map(str, tags)) - set(map(str, right.index))):
        return None, f"not measured: no sample of {', '.join(missing)} has a score"
    if len(known) < len(own):
        note += f"; {len(own) - len(known)} of {len(own)} samples have no score and are left out"
    return float(right.mean()), note


def _vbench(own: pd.DataFrame, metadata: Mapping[str, Mapping[str, Any]]) -> tuple[float | None, str]:
    parts = {column.removeprefix(_VBENCH): part for column, part in vbench_parts(own, metadata).items()}
    if missing := [name for name in (*_VBENCH_QUALITY, *_VBENCH_SEMANTIC) if name not in parts]:
        return None, f"not measured: {', '.join(missing)}"
    samples = {name: part[_VBENCH + name] for name, part in parts.items()}
    if missing := [name for name, values in samples.items() if values.isna().all()]:
        return None, f"not measured on prompts whose 'dimension' names it: {', '.join(missing)}"
    found = vbench_totals(own, metadata)
    without = sum(int(values.isna().sum()) for values in samples.values())
    return found["vbench/total"], (
        f"quality {found['vbench/quality']:.4f}, semantic {found['vbench/semantic']:.4f}, each dimension on its own of "
        f"{own['prompt_id'].nunique()} prompts" + f", {without} samples without a score" * bool(without)
    )


def vbench_parts(scores: pd.DataFrame, metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, pd.DataFrame]:
    """By the column of each dimension that is scored, the samples of the prompts on which VBench measures it: those
    whose metadata names it in `dimension`, a list."""
    parts = {}
    for name in (*_VBENCH_QUALITY, *_VBENCH_SEMANTIC):
        if (column := _VBENCH + name) in scores:
            prompts = [prompt for prompt, row in metadata.items() if name in _listed(row.get("dimension"))]
            parts[column] = scores[scores["prompt_id"].isin(prompts)]
    return parts


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def vbench_totals(scores: pd.DataFrame, metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """VBench's ``vbench/quality``, ``vbench/semantic`` and ``vbench/total``, in [0, 1] within its bounds.

    Args:
        scores: final samples of one arm; of each dimension a column ``reward/vbench_<dimension>``.
        metadata: of the prompts, by id: a dimension is the mean over samples of the prompts whose `dimension` names it,
            as VBench measures it nowhere else. Empty where one of them has none: also on prompts that are not VBench's.
    """
    scaled, parts = {}, vbench_parts(scores, metadata)
    for name in (*_VBENCH_QUALITY, *_VBENCH_SEMANTIC):
        own = parts[_VBENCH + name][_VBENCH + name] if _VBENCH + name in parts else pd.Series(dtype=float)
        if bool(own.isna().all()):
            return {}
        low, high = _VBENCH_BOUNDS.get(name, (0.0, 1.0))
        scaled[name] = (float(own.mean()) - low) / (high - low)
    weights = list(_VBENCH_QUALITY.values())
    quality = float(np.average([scaled[name] for name in _VBENCH_QUALITY], weights=weights))
    semantic = float(np.mean([scaled[name] for name in _VBENCH_SEMANTIC]))
    return {"vbench/quality": quality, "vbench/semantic": semantic, "vbench/total": (4 * quality + semantic) / 5}
