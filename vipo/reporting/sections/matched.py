"""All arms at one common level: a slower run looks like a gentler one."""

import math
from typing import Any

import pandas as pd

from vipo.evaluation.statistics import decimals
from vipo.reporting.sections.context import Page, Section
from vipo.reporting.summary import Summary


def matched(page: Page) -> Section | None:
    """Tables at matched reward and matched change, and the paths of what was not rewarded."""
    if page.summary.matched.empty:
        return None
    curves = page.summary.curves
    flat = [
        f"{label} stayed at {float(curves[column].iloc[0]):.3g} in every arm."
        for column, label in page.summary.columns.items()
        if len(curves) and float(curves[column].max() - curves[column].min()) <= 1e-9
    ]
    values = {"blocks": _blocks(page.summary), "figures": page.drawn("matched"), "flat": flat}
    return Section("matched", "Matched", values)


def _blocks(summary: Summary) -> list[dict[str, Any]]:
    """One block per held-equal column: its level and the arms' values there, seeds beside the mean."""
    blocks = []
    for on, table in summary.matched.groupby("on", sort=False):
        columns = [column for column in summary.columns if column != on]
        means = table[table["seed"].isna()]
        digits = {column: _digits(means[column]) for column in columns}
        rows = []
        for row in means.to_dict("records"):
            seeds = table[(table["arm"] == row["arm"]) & table["seed"].notna() & table["reached"].astype(bool)]
            total = int((summary.seed_curves[summary.seed_curves["arm"] == row["arm"]])["seed"].nunique())
            rows.append(
                {
                    "arm": row["arm"],
                    "reached": bool(row["reached"]),
                    "update": row["update"],
                    "values": [
                        {"mean": row[column], "seeds": [float(value) for value in seeds[column]]} for column in columns
                    ],
                    "seeds_reached": len(seeds),
                    "seeds": total,
                }
            )
        level = float(means["level"].iloc[0])
        blocks.append(
            {
                "label": summary.columns[str(on)],
                "level": None if math.isnan(level) else level,
                "level_digits": 3 if math.isnan(level) else decimals(level),
                "labels": [summary.columns[column] for column in columns],
                "digits": [digits[column] for column in columns],
                "rows": rows,
            }
        )
    return blocks


def _digits(values: "pd.Series[float]") -> int:
    return decimals(*(float(value) for value in values.dropna()))
