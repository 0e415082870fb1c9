"""Where the time goes: volatile records of this machine."""

from vipo.reporting.drawing import PART_COLORS
from vipo.reporting.figures import time_parts
from vipo.reporting.sections.context import Page, Section, drawn


def time(page: Page) -> Section:
    """Seconds of an update by part, one row a run; runs without records are named."""
    parts = time_parts(page.time)
    runs = [run for run in page.experiment.runs if not run.config.is_base]
    return Section(
        "time",
        "Time",
        {
            "unrecorded": [run.name for run in runs if run.timing.empty],
            "figure": None if page.time_figure is None else drawn(page.time_figure),
            "parts": parts,
            "part_index": {part: index % len(PART_COLORS) for index, part in enumerate(parts)},
            "rows": page.time.to_dict("records"),
        },
    )
