"""The report's section on alarms: signs of reward hacking in training, first update against last."""

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vipo.reporting.inputs import Experiment

LABELS = {
    "alarm/dark_share": "dark pixels",
    "alarm/bright_share": "blown-out pixels",
    "alarm/edge_density": "edges",
    "alarm/colour_entropy": "colour entropy, bits",
    "alarm/saturation": "saturation",
    "alarm/group_diversity": "difference within a group",
}


def alarm_section(experiment: Experiment) -> Markup:
    """The section as HTML, its texts escaped; nothing where no run has logged any sign.

    Beside the signs it has the terms of weight 0: what was measured of the training samples, and not rewarded.
    """
    unrewarded = {
        f"reward/{term.label}/mean": f"{term.label} (not rewarded)"
        for run in experiment.runs
        for term in run.config.reward.terms
        if term.weight == 0
    }
    columns = LABELS | unrewarded
    rows = [
        {
            "run": run.name,
            "cells": [
                (float(run.metrics[name].iloc[0]), float(run.metrics[name].iloc[-1])) if name in run.metrics else None
                for name in columns
            ],
        }
        for run in experiment.runs
        if not run.metrics.empty
    ]
    if not any(cell for row in rows for cell in row["cells"]):
        return Markup("")
    environment = Environment(
        loader=PackageLoader("vipo.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return Markup(environment.get_template("alarms.html.j2").render(labels=list(columns.values()), rows=rows))
