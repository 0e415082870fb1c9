"""While runs train: how far each has come, and which have not begun."""

from typing import Any

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
            begun = run is not None and not run.metrics.empty
            rows.append(
                {
                    "run": name,
                    "arm": arm if arm in experiment.coloured else None,
                    "trained": arm != "base",
                    "done": int(run.metrics["update"].max()) if run is not None and begun else None,
                    "updates": run.config.training.updates if run is not None else None,
                    "reward": float(run.metrics["reward/mean"].iloc[-1]) if run is not None and begun else None,
                    "evaluated": name in evaluated,
                }
            )
    return Section("progress", "Progress", {"rows": rows})
