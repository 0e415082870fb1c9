"""Signs of reward hacking in training, first update against last."""

from vipo.config.alarms import BASE_DISTANCE
from vipo.reporting.sections.context import Page, Section

LABELS = {
    "alarm/dark_share": "dark pixels",
    "alarm/bright_share": "blown-out pixels",
    "alarm/edge_density": "edges",
    "alarm/colour_entropy": "colour entropy, bits",
    "alarm/saturation": "saturation",
    "alarm/group_diversity": "difference within a group",
}


def alarms(page: Page) -> Section | None:
    """What each run's training samples showed; None where no run has logged any sign.

    Beside the signs it has the terms of weight 0: what was measured of the training samples, and not rewarded.
    """
    unrewarded = {
        f"reward/{term.label}/mean": f"{term.label} (not rewarded)"
        for run in page.experiment.runs
        for term in run.config.reward.terms
        if term.weight == 0
    }
    measured = any(BASE_DISTANCE in run.metrics for run in page.experiment.runs)
    columns = LABELS | ({BASE_DISTANCE: "distance to the base"} if measured else {}) | unrewarded
    rows = [
        {
            "run": run.name,
            "cells": [
                (float(run.metrics[name].iloc[0]), float(run.metrics[name].iloc[-1])) if name in run.metrics else None
                for name in columns
            ],
        }
        for run in page.experiment.runs
        if not run.metrics.empty
    ]
    if not any(cell for row in rows for cell in row["cells"]):
        return None
    return Section("alarms", "Signs of reward hacking", {"labels": list(columns.values()), "rows": rows})
