"""While runs train: how far each has come, and which have not begun."""

from typing import Any

from vipo.reporting.inputs import Run
from vipo.reporting.sections.context import Page, Section


def progress(page: Page) -> Section | None:
    """A row for each run that the experiment names; None on the finished page."""
    if not page.live:
        return None
    experiment = page.experiment
    found = {run.name: run for run in experiment.runs}
    evaluated = set(experiment.scores["run"])
    rows: list[dict[str, Any]] = []
    for arm, planned in experiment.config.experiment.arms.items():
        for seed in planned.seeds:
            name = f"{arm}-s{seed}"
            run = found.get(name)
            rows.append(
                {
                    "run": name,
                    "arm": arm if arm in experiment.coloured else None,
                    "updates": _updates(run) if arm != "base" else None,
                    "reward": float(run.metrics["reward/mean"].iloc[-1]) if run and run.updates else None,
                    "evaluated": name in evaluated,
                }
            )
    return Section("progress", "Progress", {"rows": rows})


def _updates(run: Run | None) -> str:
    return "not begun" if run is None else f"{run.updates} of {run.config.training.updates}"
