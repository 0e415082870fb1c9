"""The report: one self-contained HTML page per experiment, with its figures, tables and numbers beside it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vipo.provenance.files import atomic_folder
from vipo.reporting.figures import draw_figures, draw_time
from vipo.reporting.inputs import ReportError, read_experiment
from vipo.reporting.page import render_page
from vipo.reporting.pictures import shown_prompts
from vipo.reporting.summary import summarize, summarize_time

__all__ = ["ReportError", "build_report"]


def build_report(experiment_dir: Path, runs: Sequence[str], output: Path) -> Path:
    """Compare the runs of one experiment on a page that needs nothing but itself.

    Everything but the page, `timing.json`, `tables/time.csv` and `figures/time.svg` (which show times and provenance)
    is bit-identical for identical configurations, metrics and scores.

    Args:
        experiment_dir: ``results/<experiment>``, with the configurations, metrics and evaluations of `runs`.
        runs: names ``<arm>-s<seed>``; one of arm ``base`` and at least one other.
        output: folder that is replaced as a whole: ``index.html``, ``report.json``, ``timing.json``,
            ``figures/*.svg``, ``tables/*.csv``.

    Returns:
        The path of ``index.html``.

    Raises:
        ReportError: an input is missing or malformed; the message names the file and the fix.
        ScoresError: runs were not evaluated on the same prompts and samples.
        StorageError: the disk refused a write; `output` is as it was.
    """
    experiment = read_experiment(experiment_dir, runs)
    summary = summarize(experiment)
    time = summarize_time(experiment)
    figures = draw_figures(summary)
    time_figure = draw_time(time)
    page = render_page(experiment, summary, time, figures, time_figure, shown_prompts(experiment))
    with atomic_folder(output) as folder:
        (folder / "figures").mkdir()
        (folder / "tables").mkdir()
        for figure in [*figures, time_figure]:
            (folder / "figures" / f"{figure.name}.svg").write_text(figure.standalone())
        for name, table in {**summary.tables(), "time": time}.items():
            table.to_csv(folder / "tables" / f"{name}.csv", index=False, lineterminator="\n")
        _write_json(folder / "report.json", summary.as_json())
        _write_json(folder / "timing.json", json.loads(time.to_json(orient="records", double_precision=15)))
        (folder / "index.html").write_text(page, encoding="utf-8")
    return output / "index.html"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")
