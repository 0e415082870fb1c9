"""What the report reads: configurations, metrics, scores, samples and maps of an experiment's runs, checked."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from vipo.config.compose import load_config_file
from vipo.config.evaluation import REPORTED
from vipo.config.run import Config
from vipo.config.validation import ConfigError
from vipo.errors import VipoError
from vipo.evaluation.left_out import on_common_samples
from vipo.evaluation.titles import other_title, titles
from vipo.provenance.files import text_lines

_RUN = re.compile(r"[a-z0-9][a-z0-9_]*(\.[0-9]+)?-s\d+\Z")
_SCORE_KEYS = ("run", "arm", "seed", "update", "final", "prompt_id", "prompt", "sample")


class ReportError(VipoError):
    """The report cannot be built; the message names the file and what to do."""


@dataclass(frozen=True)
class Run:
    """One run's records. The base has no metrics, times and training provenance: it is never trained.

    Times and provenance are missing too where they were not recorded here, as for results that were pulled.
    """

    name: str
    config: Config
    metrics: pd.DataFrame
    timing: pd.DataFrame
    provenance: dict[str, Any] | None

    @property
    def updates(self) -> int:
        """Updates made so far; 0 of the base."""
        return 0 if self.metrics.empty else int(self.metrics["update"].max())


@dataclass(frozen=True)
class Experiment:
    """All inputs of a report; `runs` follow the experiment's order of arms, then seeds."""

    folder: Path
    runs: tuple[Run, ...]
    scores: pd.DataFrame
    prompt_counts: dict[str, int]
    manifest: dict[str, Any]
    #: Metrics that too few prompts have a score of in every run; no columns of `scores`.
    lost: tuple[str, ...] = ()

    @property
    def config(self) -> Config:
        """The first run's configuration, for what all runs share."""
        return self.runs[0].config

    @property
    def arms(self) -> list[str]:
        """Arms in order, the base first."""
        return list(dict.fromkeys(run.config.arm for run in self.runs))

    @property
    def coloured(self) -> list[str]:
        """Arms in the order of their colours: the first is the base's, also while nothing of it is evaluated."""
        return list(dict.fromkeys(["base", *self.arms]))

    def of_arm(self, arm: str) -> list[Run]:
        """The runs of one arm, by seed."""
        return [run for run in self.runs if run.config.arm == arm]

    @property
    def rewards(self) -> list[str]:
        """Score columns ``reward/<name>``, the trained ones first."""
        trained = [f"reward/{term.label}" for term in self.config.reward.terms]
        evaluated = [name for name in self.scores.columns if name.startswith("reward/")]
        return [*(name for name in trained if name in evaluated), *(name for name in evaluated if name not in trained)]

    @property
    def changes(self) -> list[str]:
        """Score columns ``change/<part>``."""
        return [name for name in self.scores.columns if name.startswith("change/")]


def read_experiment(folder: Path, runs: Sequence[str], config: Config) -> Experiment:
    """Read and check the inputs of a report.

    Args:
        folder: ``results/<experiment>``.
        runs: names ``<arm>-s<seed>``.
        config: of the experiment; what the report alone reads (title, question, intervals) is taken from it, all
            else from the configuration that each run was evaluated with.

    Raises:
        ReportError: a file is missing or malformed, runs do not belong together, or there is nothing to compare.
    """
    for name in runs:
        if not _RUN.match(name):
            raise ReportError(f"run {name!r}: not of the form <arm>-s<seed>")
    loaded = [_read_run(folder, name, config) for name in dict.fromkeys(runs)]
    if not any(run.config.is_base for run in loaded):
        raise ReportError(f"runs {', '.join(runs)}: none is of arm 'base', which every arm is compared with")
    if all(run.config.is_base for run in loaded):
        raise ReportError(f"runs {', '.join(runs)}: only the base; add a trained arm to compare it with")
    _require_one_experiment(folder, loaded)
    order = list(loaded[0].config.experiment.arms)
    loaded.sort(key=lambda run: (not run.config.is_base, _position(run, order), run.config.seed))
    scores = [read_scores(folder / "evaluation" / run.name / "scores.parquet", run.config) for run in loaded]
    for run, table in zip(loaded, scores, strict=True):
        if list(table.columns) != list(scores[0].columns):
            raise ReportError(
                f"{folder / 'evaluation' / run.name / 'scores.parquet'}: columns {list(table.columns)} are not those "
                f"of {loaded[0].name} ({list(scores[0].columns)}); evaluate both again"
            )
        if fault := other_title(table, config.protocol_title or titles(scores[0])[0]):
            raise ReportError(f"{folder / 'evaluation' / run.name}: {fault}")
    common, lost = on_common_samples(pd.concat(scores, ignore_index=True))
    trained = {f"reward/{term.label}" for run in loaded for term in run.config.reward.terms if term.weight != 0}
    if missing := sorted(trained & set(lost)):
        raise ReportError(
            f"{folder / 'evaluation'}: fewer than two prompts have a score of {', '.join(missing)} in every run, and "
            "it was trained; see why it scores so few, and evaluate again"
        )
    return Experiment(folder, tuple(loaded), common, *_read_prompts(folder), lost)


def read_training(folder: Path, runs: Sequence[str], config: Config) -> Experiment:
    """What there is of an experiment while its runs train: configurations, metrics and times, no scores.

    Args:
        folder, runs, config: as for `read_experiment`; runs that have not begun are left out.

    Raises:
        ReportError: the prompts are not prepared, or a file is malformed or half written.
    """
    found = []
    for name in runs:
        path = folder / "runs" / name
        if (path / "metrics.jsonl").is_file() and (path / "config.yaml").is_file():
            own = load_config_file(path / "config.yaml")
            timing = path / "timing.jsonl"
            times = read_rows(timing) if timing.is_file() else pd.DataFrame()
            record = path / "provenance.json"
            made = _read_mapping(record) if record.is_file() else None
            found.append(Run(name, own, read_rows(path / "metrics.jsonl"), times, made))
    if not found:
        raise ReportError(f"{folder / 'runs'}: no run has made an update yet; start one with 'vipo train'")
    order = list(config.experiment.arms)
    found.sort(key=lambda run: (_position(run, order), run.config.seed))
    scores = pd.DataFrame({key: pd.Series(dtype="bool" if key == "final" else "object") for key in _SCORE_KEYS})
    return Experiment(folder, tuple(found), scores, *_read_prompts(folder))


def _read_prompts(folder: Path) -> tuple[dict[str, int], dict[str, Any]]:
    prompts = folder / "prompts"
    counts = {name: len(text_lines(_read_text(prompts / f"{name}.jsonl"))) for name in ("train", "eval")}
    return counts, _read_mapping(prompts / "manifest.json")


def _position(run: Run, order: Sequence[str]) -> int:
    return order.index(run.config.arm) if run.config.arm in order else len(order)


def _require_one_experiment(folder: Path, runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs:
        for part in ("reward", "evaluation"):
            if getattr(run.config, part) != getattr(first.config, part):
                raise ReportError(
                    f"{folder / 'evaluation' / run.name}: section {part} is not that of {first.name}; "
                    "runs of one report share it, so leave one of them out or run it again"
                )


def _read_run(folder: Path, name: str, report: Config) -> Run:
    path = folder / "evaluation" / name / "config.yaml"
    try:
        config = load_config_file(path)
    except ConfigError as error:
        raise ReportError(f"{error}; evaluate {name} first") from error
    if config.run_name != name:
        raise ReportError(f"{path}: describes run {config.run_name}, not {name}; a run's folder keeps its name")
    if config.experiment.name != report.experiment.name:
        raise ReportError(
            f"{path}: is of experiment {config.experiment.name}, not of {report.experiment.name}; an experiment's "
            f"folder keeps its name: move it to .../{config.experiment.name} and give what is above it as --results"
        )
    evaluation = {key: getattr(report.evaluation, key) for key in REPORTED}
    sections = {"experiment": report.experiment, "evaluation": config.evaluation.model_copy(update=evaluation)}
    if config.is_base:
        # Never trained: the rewards that were trained are the other runs'.
        config = config.model_copy(update={**sections, "reward": report.reward})
        return Run(name, config, pd.DataFrame(), pd.DataFrame(), None)
    run = folder / "runs" / name
    timing, record = run / "timing.jsonl", run / "provenance.json"
    return Run(
        name,
        config.model_copy(update=sections),
        read_rows(run / "metrics.jsonl"),
        read_rows(timing) if timing.is_file() else pd.DataFrame(),
        _read_mapping(record) if record.is_file() else None,
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: cannot be read ({error}); run the stage that writes it") from error


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: is not JSON ({error}); run the stage that writes it again") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path}: holds no JSON object; run the stage that writes it again")
    return value


def read_rows(path: Path) -> pd.DataFrame:
    """The rows of ``metrics.jsonl`` or ``timing.jsonl``, one an update.

    Raises:
        ReportError: the file is missing, empty, or a line is no such row.
    """
    rows = []
    for number, line in enumerate(text_lines(_read_text(path)), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ReportError(f"{path}, line {number}: is not JSON ({error}); train the run again") from error
        if not isinstance(row, dict) or not isinstance(row.get("update"), int):
            raise ReportError(f"{path}, line {number}: has no whole number 'update'; train the run again")
        rows.append(row)
    if not rows:
        raise ReportError(f"{path}: holds no update; train the run first")
    return pd.DataFrame(rows)


def read_scores(path: Path, config: Config) -> pd.DataFrame:
    """A run's ``scores.parquet``: one row per update and sample.

    Raises:
        ReportError: the file is missing or malformed, holds another run's rows or values that are not finite; NaN of
            a reward is a sample without a score.
    """
    name = config.run_name
    if not path.is_file():
        raise ReportError(f"{path}: missing; evaluate {name} first")
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read ({error}); evaluate {name} again") from error
    missing = [key for key in (*_SCORE_KEYS, "change/total") if key not in table]
    if missing:
        raise ReportError(f"{path}: no column {', '.join(missing)}; evaluate {name} again")
    if table.empty or set(table["run"]) != {name}:
        raise ReportError(f"{path}: holds rows of {sorted(set(table['run']))}, not of {name}; evaluate it again")
    for term in config.reward.terms:
        if f"reward/{term.label}" not in table:
            raise ReportError(
                f"{path}: the trained reward '{term.label}' was not evaluated; add it to evaluation.rewards and "
                "evaluate again"
            )
    measured = [name for name in table.columns if name.startswith(("reward/", "change/"))]
    if texts := [name for name in ("update", *measured) if not is_numeric_dtype(table[name])]:
        raise ReportError(f"{path}: {', '.join(texts)}: no numbers; evaluate {name} again")
    numbers = table[measured]
    values = numbers.to_numpy(dtype=np.float64)
    rewards = numbers.columns.str.startswith("reward/")
    finite = (np.isfinite(values) | (np.isnan(values) & rewards)).all(axis=0)
    if not finite.all():
        raise ReportError(f"{path}: values of {', '.join(numbers.columns[~finite])} are not finite; evaluate again")
    if config.is_base != bool((table["update"] == 0).all()) or not table["final"].any():
        raise ReportError(f"{path}: a trained run has updates above 0 and final rows, the base update 0 alone")
    return table
