"""All arms against all measures in one matrix, the differences as intervals, and the way there."""

from typing import Any

from vipo.evaluation.statistics import decimals
from vipo.reporting.sections.context import Page, Section
from vipo.reporting.summary import Summary


def comparison(page: Page) -> Section | None:
    """Arms x metrics after the last update, against the base and against GRPO."""
    summary = page.summary
    if summary.comparisons.empty:
        return None
    # Where the change falls has a section of its own.
    columns = {key: label for key, label in summary.columns.items() if not key.startswith("change/")}
    columns |= {"change/total": summary.columns["change/total"]}
    references = [name for name in ("base", "grpo") if any(summary.final(column, name) for column in columns)]
    return Section(
        "comparison",
        "Comparison",
        {
            "references": references,
            "columns": [{"label": label, "kind": _kind(summary, column)} for column, label in columns.items()],
            "rows": _matrix(summary, list(columns), references),
            "arms": [row["arm"] for row in summary.arms.to_dict("records")],
            "forest": page.drawn("forest"),
            "held_out": page.drawn("held_out"),
        },
    )


def _kind(summary: Summary, column: str) -> str:
    if column in summary.trained:
        return "trained"
    return "against the base's picture" if column.startswith("change/") else "never rewarded"


def _matrix(summary: Summary, columns: list[str], references: list[str]) -> list[dict[str, Any]]:
    arms = summary.arms.to_dict("records")
    digits = {column: decimals(*(row[column] for row in arms)) for column in columns}
    found = {(column, name): summary.final(column, name) for column in columns for name in references}
    return [
        {
            "arm": row["arm"],
            "seeds": row["seed_count"],
            "cells": [
                {
                    "mean": row[column],
                    "digits": digits[column],
                    "against": {name: found[column, name].get(row["arm"]) for name in references},
                }
                for column in columns
            ],
        }
        for row in arms
    ]
