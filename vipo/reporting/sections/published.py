"""The published table of the experiment's source beside what was measured here."""

from collections.abc import Mapping
from typing import Any

from vipo.evaluation.statistics import decimals
from vipo.reporting.published import NOT_MEASURED, NOT_RUN, partly, published_values, unscored, with_totals
from vipo.reporting.sections.context import Page, Section
from vipo.reporting.wording import number


def published(page: Page) -> Section | None:
    """Each published number with ours at its right; what was not run or not measured says so."""
    experiment = page.experiment.config.experiment
    table = experiment.published
    if table is None:
        return None
    scores = page.experiment.scores
    final = dict(list(scores[scores["final"]].groupby("arm")))
    arms = {
        row["arm"]: with_totals(row, final[row["arm"]], page.experiment.folder)
        for row in page.summary.arms.to_dict("records")
        if row["arm"] in final
    }
    heads = [{"title": column.title, "domain": column.domain} for column in table.columns]
    digits = {
        column.metric: max(4, decimals(*(row[column.metric] for row in arms.values() if column.metric in row)))
        for column in table.columns
    }
    rows = []
    for arm, theirs in published_values(table).items():
        seeds = len(experiment.arms[arm].seeds)
        cells = [
            {
                "theirs": value,
                "ours": _ours(arms.get(arm), column.metric, digits[column.metric], seeds)
                + (unscored(page.experiment.scores, column.metric, page.experiment.folder) if arm in arms else ""),
            }
            for column, value in zip(table.columns, theirs, strict=True)
        ]
        rows.append({"arm": arm, "title": table.rows[arm].title, "known": arm in arms, "cells": cells})
    return Section("published", "Published", {"source": table.source, "heads": heads, "rows": rows})


def _ours(row: Mapping[Any, Any] | None, metric: str, digits: int, seeds: int) -> str:
    if row is None:
        return NOT_RUN
    if metric not in row:
        return NOT_MEASURED
    return number(row[metric], digits) + partly(row["seed_count"], seeds)
