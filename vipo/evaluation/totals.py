"""Numbers of a whole set of prompts: GenEval's overall score and VBench's total.

Pure functions of the rows of `scores.parquet`. A number that cannot be computed is missing, and the table says why.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from vipo.prompts.vbench import VBENCH, has_dimensions, is_measured

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
_VBENCH = f"reward/{VBENCH}"
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
            prompts = [id_ for id_, row in metadata.items() if has_dimensions(row) and is_measured(VBENCH + name, row)]
            parts[column] = scores[scores["prompt_id"].isin(prompts)]
    return parts


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
