"""The stages that put all runs' results together: numbers, pages, the crate."""

from collections.abc import Callable, Sequence
from pathlib import Path

from vipo.config.run import Config
from vipo.provenance import record_stage, run_lock, sign_file
from vipo.provenance.records import PROVENANCE
from vipo.stages.names import experiment_folder, run_names


def summarize_stage(config: Config, root: Path, results: Path, wait: float = 0) -> Path:
    """All runs of the experiment to the report's numbers, ``report/data``: the same bytes for the same results."""
    from vipo.reporting import build_data

    experiment, runs = experiment_folder(config, results), run_names(config)
    output = experiment / "report" / "data"

    def written() -> list[Path]:
        found = (path for path in sorted(output.rglob("*")) if path.is_file() and not path.name.startswith(".lock"))
        return [path for path in found if path.name != PROVENANCE]

    with (
        # The page's folder: its own is replaced as a whole, and a lock in it with it.
        run_lock(output.parent, wait_seconds=wait),
        record_stage(
            "summarize",
            output,
            inputs=_measured(experiment, runs),
            outputs=written,
            config=config.report_identity(),
            # Of the intervals' bootstrap.
            seeds=[config.evaluation.seed],
            root=root,
        ),
    ):
        return build_data(experiment, runs, config, output)


def report_stage(config: Config, root: Path, results: Path, wait: float = 0) -> Path:
    """All runs of the experiment to ``report/index.html``; the numbers beside it first where they are missing.

    Times and records that are not here (results that were pulled come without them) are shown as such.
    """
    from vipo.reporting import PICTURES, TIMES, build_report

    experiment, runs = experiment_folder(config, results), run_names(config)
    output = experiment / "report"

    def written() -> list[Path]:
        found = (output / name for name in ("index.html", *TIMES))
        return [*(path for path in found if path.is_file()), *sorted((output / PICTURES).glob("*"))]

    data = output / "data" / "report.json"
    if not data.is_file():
        summarize_stage(config, root, results, wait)
    shown = [experiment / "evaluation" / run / "maps.safetensors" for run in runs]
    shown += [experiment / "samples" / run / "pictures" for run in runs]
    volatile = [experiment / "runs" / run / name for run in runs for name in ("timing.jsonl", PROVENANCE)]
    with (
        run_lock(output, wait_seconds=wait),
        record_stage(
            "report",
            output,
            inputs=[
                data,
                *_measured(experiment, runs),
                *shown,
                *_measurements(experiment, config),
                *(path for path in volatile if path.is_file()),
            ],
            outputs=written,
            config=config.report_identity(),
            # The page is checked against the numbers, computed once more.
            seeds=[config.evaluation.seed],
            root=root,
        ),
    ):
        return build_report(experiment, runs, config, output)


def watch_stage(config: Config, results: Path, say: Callable[[object], None], every: float) -> None:
    """The page of an experiment whose runs train, drawn again after each change until it is interrupted."""
    from vipo.reporting.watch import watch_report

    watch_report(experiment_folder(config, results), run_names(config), config, say, every)


def crate_stage(
    config: Config, root: Path, results: Path, wait: float = 0, key: Path | None = None, archive: bool = False
) -> list[Path]:
    """Everything of the experiment, described in ``ro-crate-metadata.json``, signed and zipped where asked for.

    Returns:
        The files written, the metadata first.
    """
    from vipo.provenance.crate import write_crate, zip_crate

    experiment = experiment_folder(config, results)
    with run_lock(experiment / "crate", wait_seconds=wait):
        written = [write_crate(experiment, root)]
        if key is not None:
            written.append(sign_file(written[0], key))
        if archive:
            written.append(zip_crate(experiment))
    return written


def study_stage(configs: Sequence[Config], results: Path, output: Path) -> Path:
    """Several experiments' results to the study's tables, figures and page; the first one's configuration decides."""
    from vipo.reporting.study import build_study

    return build_study([(experiment_folder(config, results), run_names(config), config) for config in configs], output)


def _measurements(experiment: Path, config: Config) -> list[Path]:
    if config.experiment.meter is None:
        return []
    # Imports torch, for which few pages have a use.
    from vipo.reporting.measured import measurement_files

    return measurement_files(experiment, config.experiment.meter)


def _measured(experiment: Path, runs: Sequence[str]) -> list[Path]:
    paths = [experiment / "prompts" / name for name in ("train.jsonl", "eval.jsonl", "manifest.json")]
    for run in runs:
        paths += [experiment / "evaluation" / run / name for name in ("config.yaml", "scores.parquet")]
        if not run.startswith("base-"):
            paths.append(experiment / "runs" / run / "metrics.jsonl")
    return paths
