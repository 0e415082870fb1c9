"""A published table beside our own numbers: every cell that nothing was run for says so."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vipo.config.published import PublishedConfig
from vipo.config.run import Config
from vipo.config.validation import ConfigError
from vipo.evaluation.left_out import left_out, on_common_samples
from vipo.evaluation.means import mean_scores
from vipo.evaluation.totals import vbench_parts, vbench_totals
from vipo.prompts import read_prompts
from vipo.prompts.vbench import VBENCH
from vipo.reporting.inputs import read_scores
from vipo.reporting.runs import read_run
from vipo.text import visible

NOT_RUN, NOT_MEASURED = "not run", "not measured"
_DOMAINS = {"in": "in-domain", "out": "out-of-domain"}


def published_table(config: Config, results: Path) -> str:
    """The table of `experiment.published` in Markdown, each number of the publication with ours at its right.

    Ours is the mean over an arm's seeds of the mean over final held-out samples; where fewer seeds are evaluated than
    the arm has, it says how many. An evaluation that belongs to other weights or settings counts as not run.

    Raises:
        ConfigError: the experiment has no published table.
        PromptError, ReportError, ProvenanceError: files of an evaluation are damaged.
    """
    table = config.experiment.published
    if table is None:
        raise ConfigError(
            f"experiment {config.experiment.name!r} has no published table (experiment.published); "
            "experiment=paper_flux and experiment=paper_wan do"
        )
    heads = [f"{column.title} ({_DOMAINS[column.domain]})" for column in table.columns]
    lines = [_row(["", *(text for head in heads for text in (f"{head}, published", "ours"))])]
    lines.append("|---|" + "---:|" * 2 * len(heads))
    printed, folder = published_values(table), results / config.experiment.name
    seeds = {arm: config.experiment.arms[arm].seeds for arm in table.rows}
    names = [f"{arm}-s{seed}" for arm, own in seeds.items() for seed in own]
    there = {name: own for name in names if (own := _final_scores(folder, name)) is not None}
    every = _on_common_samples(there)
    for arm, row in table.rows.items():
        scores = [every[name] for name in (f"{arm}-s{seed}" for seed in seeds[arm]) if name in every]
        means = [_means(own, folder) for own in scores]
        cells = [f"{row.title} (`{arm}`)"]
        for column, value in zip(table.columns, printed[arm], strict=True):
            cells += [value, _ours(means, scores, column.metric, len(seeds[arm]), folder)]
        lines.append(_row(cells))
    return f"Published: {_cell(table.source)}.\n\n" + "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(_cell(text) for text in cells)} |"


def _cell(text: str) -> str:
    return visible(" ".join(text.split())).replace("|", "\\|")


def published_values(table: PublishedConfig) -> dict[str, list[str]]:
    """The publication's cells by arm, each column with as many decimal places as its longest number."""
    columns = zip(*(row.values for row in table.rows.values()), strict=True)
    places = [max((_places(value) for value in column if value is not None), default=0) for column in columns]
    return {
        arm: [
            "not published" if value is None else f"{value:.{digits}f}"
            for value, digits in zip(row.values, places, strict=True)
        ]
        for arm, row in table.rows.items()
    }


def _places(value: float) -> int:
    """Decimal places of a number as it is written out, without an exponent or zeros at its end."""
    return len(np.format_float_positional(value, trim="-").partition(".")[2])


def partly(found: int, planned: int) -> str:
    """What stands behind a mean of fewer seeds than are planned."""
    return f" ({found} of {planned} seeds)" if found < planned else ""


def unscored(scores: pd.DataFrame, metric: str, experiment: Path) -> str:
    """What a mean, or one of VBench's numbers, is not over."""
    count = left_out(scores, metric) if metric in scores else 0
    if metric.startswith("vbench/"):
        own = scores[scores["final"]]
        count = sum(left_out(part, column) for column, part in vbench_parts(own, _metadata(experiment)).items())
    return f" (samples left out: {count})" if count else ""


def with_totals(means: Mapping[Any, Any], final: pd.DataFrame, experiment: Path) -> dict[Any, Any]:
    """Means by score column, and where the held-out prompts are VBench's its three numbers, in percent as published.

    Args:
        means: of one arm.
        final: its final samples.
        experiment: ``results/<experiment>``, with the prompts.

    Raises:
        PromptError: there are scores of VBench's dimensions, and the prompts cannot be read.
    """
    if not any(str(name).startswith(f"reward/{VBENCH}") for name in final):
        return dict(means)
    return {**means, **{name: 100 * value for name, value in vbench_totals(final, _metadata(experiment)).items()}}


def _metadata(experiment: Path) -> dict[str, Mapping[str, Any]]:
    return {prompt.id: prompt.metadata for prompt in read_prompts(experiment / "prompts" / "eval.jsonl")}


def _means(scores: pd.DataFrame, experiment: Path) -> dict[Any, Any]:
    return with_totals(mean_scores(scores, [name for name in map(str, scores) if "/" in name]), scores, experiment)


def _ours(means: list[dict[Any, Any]], scores: list[pd.DataFrame], metric: str, seeds: int, experiment: Path) -> str:
    if not means:
        return NOT_RUN
    if not all(metric in own for own in means):
        return NOT_MEASURED
    mean = sum(own[metric] for own in means) / len(means)
    return f"{mean:.4f}" + partly(len(means), seeds) + unscored(pd.concat(scores), metric, experiment)


def _on_common_samples(every: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """What is printed below each other is over the same samples: of each metric, those of all runs that measured it."""
    found = dict(every)
    for column in sorted({str(name) for own in every.values() for name in own if str(name).startswith("reward/")}):
        having = {name: own[["prompt_id", "sample", column]] for name, own in every.items() if column in own}
        common, lost = on_common_samples(pd.concat(having))
        for name in having:
            found[name] = (
                found[name].drop(columns=column)
                if lost
                else found[name].assign(**{column: common.loc[[name], column].to_numpy()})
            )
    return found


def _final_scores(experiment: Path, run: str) -> pd.DataFrame | None:
    """Of an evaluated run; None where nothing was evaluated, or with other weights or settings than it has now."""
    file = experiment / "evaluation" / run / "scores.parquet"
    if not file.is_file():
        return None
    records = read_run(experiment / "runs" / run)
    if records.stale is not None:
        return None
    scores = read_scores(file, records.config)
    return scores[scores["final"]]
