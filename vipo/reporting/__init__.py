"""The report: the numbers that compare an experiment's runs, and one self-contained HTML page that shows them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vipo.config.models import Config
from vipo.provenance.files import atomic_file, atomic_folder
from vipo.reporting.figures import draw_figures, draw_time
from vipo.reporting.inputs import ReportError, read_experiment
from vipo.reporting.page import render_page
from vipo.reporting.pictures import shown_prompts
from vipo.reporting.summary import summarize, summarize_time

__all__ = ["TIMES", "ReportError", "build_data", "build_report"]

TIMES = ("time.json", "time.csv", "time.svg")
"""The page's times beside it, where they were recorded here."""


def build_data(experiment_dir: Path, runs: Sequence[str], config: Config, output: Path) -> Path:
    """Compare the runs of one experiment in numbers: the same bytes for the same configurations, metrics and scores.

    Args:
        experiment_dir: ``results/<experiment>``, with the metrics and evaluations of `runs`.
        runs: names ``<arm>-s<seed>``; one of arm ``base`` and at least one other.
        config: of the experiment; see `read_experiment`.
        output: folder that is replaced as a whole: ``report.json``, ``figures/*.svg``, ``tables/*.csv``.

    Returns:
        The path of ``report.json``.

    Raises:
        ReportError: an input is missing or malformed; the message names the file and the fix.
        ScoresError: runs were not evaluated on the same prompts and samples.
        StorageError: the disk refused a write; `output` is as it was.
    """
    summary = summarize(read_experiment(experiment_dir, runs, config))
    figures = draw_figures(summary)
    with atomic_folder(output) as folder:
        (folder / "figures").mkdir()
        (folder / "tables").mkdir()
        for figure in figures:
            (folder / "figures" / f"{figure.name}.svg").write_text(figure.standalone())
        for name, table in summary.tables().items():
            table.to_csv(folder / "tables" / f"{name}.csv", index=False, lineterminator="\n")
        _write_json(folder / "report.json", summary.as_json())
    return output / "report.json"


def build_report(experiment_dir: Path, runs: Sequence[str], config: Config, output: Path) -> Path:
    """Show the numbers, pictures, times and records of an experiment on a page that needs nothing but itself.

    Args:
        experiment_dir, runs, config: as for `build_data`.
        output: folder with ``data/report.json``; ``index.html`` is written beside it and, where times were recorded
            here, `TIMES`.

    Returns:
        The path of ``index.html``.

    Raises:
        ReportError: an input is missing or malformed, or ``data/report.json`` says something else than the results.
        ScoresError: runs were not evaluated on the same prompts and samples.
        StorageError: the disk refused a write.
    """
    experiment = read_experiment(experiment_dir, runs, config)
    summary = summarize(experiment)
    data = output / "data" / "report.json"
    if not _agree(json.loads(data.read_text()), json.loads(json.dumps(summary.as_json()))):
        raise ReportError(f"{data}: was made from other results; run 'vipo summarize' again")
    time = summarize_time(experiment)
    time_figure = None if time.empty else draw_time(time)
    page = render_page(experiment, summary, time, draw_figures(summary), time_figure, shown_prompts(experiment))
    for name in TIMES:
        (output / name).unlink(missing_ok=True)
    if time_figure is not None:
        with atomic_file(output / "time.json") as path:
            _write_json(path, json.loads(time.to_json(orient="records", double_precision=15)))
        with atomic_file(output / "time.csv") as path:
            time.to_csv(path, index=False, lineterminator="\n")
        with atomic_file(output / "time.svg") as path:
            path.write_text(time_figure.standalone())
    with atomic_file(output / "index.html") as path:
        path.write_text(page, encoding="utf-8")
    return output / "index.html"


def _agree(written: Any, computed: Any) -> bool:
    # Another processor may round the last digits of a mean in another way; that is no other result.
    if isinstance(written, dict) and isinstance(computed, dict):
        return written.keys() == computed.keys() and all(_agree(written[key], computed[key]) for key in written)
    if isinstance(written, list) and isinstance(computed, list):
        return len(written) == len(computed) and all(map(_agree, written, computed))
    if isinstance(written, float) and isinstance(computed, float):
        return math.isclose(written, computed, rel_tol=1e-6, abs_tol=1e-9)
    return bool(written == computed)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")
