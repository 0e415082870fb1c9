"""How far each arm's pictures are from the base's, and where."""

import math

from vipo.reporting.sections.context import Page, Section


def change(page: Page) -> Section | None:
    """Change against the base, split by foreground and background where the evaluation could."""
    summary = page.summary
    columns = [column for column in summary.columns if column.startswith("change/")]
    split = {"change/foreground", "change/background"} <= set(columns)
    rows = []
    for row in summary.arms.to_dict("records"):
        if row["arm"] == "base":
            continue
        background = row["change/background"] if split else math.nan
        rows.append(
            {
                "arm": row["arm"],
                "cells": [summary.final(column, "base").get(row["arm"]) for column in columns],
                "ratio": row["change/foreground"] / background if split and background > 0 else None,
            }
        )
    if not rows or not columns:
        return None
    values = {"labels": [summary.columns[column] for column in columns], "split": split, "rows": rows}
    return Section("change", "Change", {**values, "figures": page.drawn("change")})
