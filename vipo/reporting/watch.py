"""The page while runs train: what is there so far, drawn again whenever it has changed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vipo.config.run import Config
from vipo.errors import VipoError
from vipo.provenance.files import atomic_file
from vipo.reporting.figures import draw_comparison, draw_time, draw_training
from vipo.reporting.gallery import NO_PICTURES
from vipo.reporting.inputs import Experiment, read_experiment, read_training
from vipo.reporting.page import render_page
from vipo.reporting.pictures import read_gallery
from vipo.reporting.sections.context import Page
from vipo.reporting.summary import summarize, summarize_training
from vipo.reporting.tables import summarize_time

LIVE = "live.html"


def watch_report(
    experiment_dir: Path, runs: Sequence[str], config: Config, say: Callable[[object], None], every: float
) -> None:
    """Write ``live.html`` beside the results, again after each change, until it is interrupted.

    Nothing but that file is written, and no lock is taken: training goes on undisturbed. A browser that has it open
    renews it by itself. What cannot be read yet is said, and looked for again.

    Args:
        experiment_dir, runs, config: as for `read_experiment`.
        say: told the page's path after each drawing, and why there is none.
        every: seconds between looks.
    """
    seen: object = None
    while True:
        now = _state(experiment_dir)
        if now != seen:
            seen = now
            try:
                say(build_live(experiment_dir, runs, config))
            except VipoError as error:
                say(f"not yet: {error}")
        time.sleep(every)


def build_live(experiment_dir: Path, runs: Sequence[str], config: Config) -> Path:
    """The page of what there is so far: curves of all runs that train, and the comparison of those evaluated.

    Returns:
        The path of ``live.html``.

    Raises:
        ReportError: no run has made an update, or a file is malformed or half written.
    """
    experiment = read_training(experiment_dir, runs, config)
    compared = _evaluated(experiment_dir, runs, config)
    evaluated = None if compared is None else summarize(compared)
    summary = summarize_training(experiment, evaluated)
    if compared is not None:
        compared_names = {run.name for run in compared.runs}
        others = tuple(run for run in experiment.runs if run.name not in compared_names)
        experiment = replace(compared, runs=(*compared.runs, *others))
    compared_figures = draw_comparison(summary) if summary.headline else []
    times = summarize_time(experiment)
    page = Page(
        experiment,
        summary,
        [*compared_figures, *draw_training(summary, experiment.coloured)],
        times,
        None if times.empty else draw_time(times),
        NO_PICTURES if compared is None else read_gallery(compared, inline=True),
        live=True,
    )
    output = experiment_dir / LIVE
    with atomic_file(output) as path:
        path.write_text(render_page(page), encoding="utf-8")
    return output


def _evaluated(experiment_dir: Path, runs: Sequence[str], config: Config) -> Experiment | None:
    """The runs that are trained and evaluated, where the base and another one are."""
    whole = ("config.yaml", "scores.parquet", "maps.safetensors")
    done = [name for name in runs if all((experiment_dir / "evaluation" / name / file).is_file() for file in whole)]
    trained = [name for name in done if (experiment_dir / "runs" / name / "metrics.jsonl").is_file()]
    if not trained or len(trained) == len(done):
        return None
    return read_experiment(experiment_dir, done, config)


def _state(experiment_dir: Path) -> object:
    files = [*experiment_dir.glob("runs/*/metrics.jsonl"), *experiment_dir.glob("evaluation/*/scores.parquet")]
    return [(path, (found := path.stat()).st_mtime_ns, found.st_size) for path in sorted(files)]
