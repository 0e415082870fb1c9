"""The report: the numbers that compare an experiment's runs, and one self-contained HTML page that shows them."""

import contextlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vipo.config.run import Config
from vipo.provenance.files import atomic_file, atomic_folder
from vipo.reporting.drawing import Plot
from vipo.reporting.figures import draw_figures, draw_time
from vipo.reporting.gallery import PICTURES
from vipo.reporting.inputs import Experiment, ReportError, read_experiment
from vipo.reporting.page import render_page
from vipo.reporting.sections.context import Page
from vipo.reporting.summary import Summary, summarize
from vipo.reporting.tables import summarize_time

__all__ = ["PICTURES", "TIMES", "ReportError", "build_data", "build_report", "report_files"]

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
    files = _data_files(summary, draw_figures(summary), config.protocol_title)
    with atomic_folder(output) as folder:
        (folder / "figures").mkdir()
        (folder / "tables").mkdir()
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
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
    files, pictures = _page_files(experiment, summary, draw_figures(summary))
    _write_pictures(pictures, output)
    # All are written before the first one is renamed into place. The stack unwinds backwards: the page last, for it is
    # what tells that the report is there.
    with contextlib.ExitStack() as stack:
        for name in sorted(files, key=lambda name: name != "index.html"):
            stack.enter_context(atomic_file(output / name)).write_text(files[name], encoding="utf-8")
    for name in set(TIMES) - files.keys():
        (output / name).unlink(missing_ok=True)
    if not pictures and (output / PICTURES).is_dir():
        shutil.rmtree(output / PICTURES)
    return output / "index.html"


def report_files(experiment_dir: Path, runs: Sequence[str], config: Config) -> dict[str, str]:
    """What `build_data` (below ``data/``) and `build_report` write, as texts by path, without writing it.

    Raises:
        ReportError, ScoresError: as theirs.
    """
    experiment = read_experiment(experiment_dir, runs, config)
    summary = summarize(experiment)
    figures = draw_figures(summary)
    data = {f"data/{name}": text for name, text in _data_files(summary, figures, config.protocol_title).items()}
    return data | _page_files(experiment, summary, figures)[0]


def _write_pictures(pictures: Mapping[str, bytes], output: Path) -> None:
    """Named by their content: an older page's stay whole until the new ones are there."""
    if not pictures:
        return
    with atomic_folder(output / PICTURES) as folder:
        for name, content in pictures.items():
            (folder / Path(name).name).write_bytes(content)


def _data_files(summary: Summary, figures: Sequence[Plot], protocol: str | None) -> dict[str, str]:
    return {
        **{f"figures/{figure.name}.svg": figure.standalone() for figure in figures},
        **{f"tables/{name}.csv": _csv(_named(table, protocol)) for name, table in summary.tables().items()},
        "report.json": _json(summary.as_json()),
    }


def _named(table: pd.DataFrame, protocol: str | None) -> pd.DataFrame:
    """A table with the evaluation's protocol in front: without it, a number is nobody else's."""
    if protocol is None or not len(table.columns):
        return table
    named = table.copy()
    named.insert(0, "protocol", protocol)
    return named


def _page_files(
    experiment: Experiment, summary: Summary, figures: Sequence[Plot]
) -> tuple[dict[str, str], Mapping[str, bytes]]:
    """The texts by name, and the pictures that lie beside the page."""
    time = summarize_time(experiment)
    time_figure = None if time.empty else draw_time(time)
    files = {}
    if time_figure is not None:
        times = _json(json.loads(time.to_json(orient="records", double_precision=15)))
        files = dict(zip(TIMES, (times, _csv(time), time_figure.standalone()), strict=True))
    # Pictures need torch, the numbers do not.
    from vipo.reporting.pictures import read_gallery

    gallery = read_gallery(experiment)
    page = render_page(Page(experiment, summary, figures, time, time_figure, gallery))
    return files | {"index.html": page}, gallery.files


def _agree(written: Any, computed: Any) -> bool:
    # Another processor may round the last digits of a mean in another way; that is no other result.
    if isinstance(written, dict) and isinstance(computed, dict):
        return written.keys() == computed.keys() and all(_agree(written[key], computed[key]) for key in written)
    if isinstance(written, list) and isinstance(computed, list):
        return len(written) == len(computed) and all(map(_agree, written, computed))
    if isinstance(written, float) and isinstance(computed, float):
        return math.isclose(written, computed, rel_tol=1e-6, abs_tol=1e-9)
    return bool(written == computed)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False, lineterminator="\n")
