"""The published table of the experiment's source beside what was measured here."""

from collections.abc import Mapping
from typing import Any

from vipo.evaluation.statistics import decimals
from vipo.reporting.published import NOT_MEASURED, NOT_RUN, published_value
from vipo.reporting.sections.context import Page, Section
from vipo.reporting.wording import number


def published(page: Page) -> Section | None:
    """Each published number with ours at its right; what was not run or not measured says so."""
    table = page.experiment.config.experiment.published
    if table is None:
        return None
    arms = {row["arm"]: row for row in page.summary.arms.to_dict("records")}
    heads = [{"title": column.title, "domain": column.domain} for column in table.columns]
    rows = []
    for arm, row in table.rows.items():
        cells = [
            {"theirs": published_value(value), "ours": _ours(arms.get(arm), column.metric)}
            for column, value in zip(table.columns, row.values, strict=True)
        ]
        rows.append({"arm": arm, "title": row.title, "known": arm in arms, "cells": cells})
    return Section("published", "Published", {"source": table.source, "heads": heads, "rows": rows})


def _ours(row: Mapping[Any, Any] | None, metric: str) -> str:
    if row is None:
        return NOT_RUN
    if metric not in row:
        return NOT_MEASURED
    return number(row[metric], max(4, decimals(row[metric])))
