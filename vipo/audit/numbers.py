"""Every number that is drawn from scores, computed again by the library's own functions."""

import csv
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vipo.audit.examination import VOLATILE, Examination
from vipo.config.compose import dump_config
from vipo.evaluation.evaluate import summarize
from vipo.provenance.environment import package_sha256, versions
from vipo.provenance.lineage import PROVENANCE
from vipo.reporting import ReportError, build_report
from vipo.stages import run_names

_AGAIN = "run the stage that writes it again"


def check_numbers(examination: Examination) -> None:
    """Manifest from prompts, summaries from scores, report from everything; metrics for being whole."""
    _check_manifest(examination)
    for folder, stage in examination.stages().items():
        if stage == "evaluate":
            with examination.guarded(f"{folder}/summary.json", "numbers"):
                scores = pd.read_parquet(examination.folder / folder / "scores.parquet")
                told = json.loads((examination.folder / folder / "summary.json").read_text())
                _compare(examination, f"{folder}/summary.json", told, summarize(scores))
        elif stage == "train":
            with examination.guarded(f"{folder}/metrics.jsonl", "numbers"):
                _check_metrics(examination, folder)
    if "report" in examination.stages():
        with examination.guarded("report", "numbers"):
            _check_report(examination)


def _check_manifest(examination: Examination) -> None:
    if "prompts/manifest.json" not in examination.files:
        return
    with examination.guarded("prompts/manifest.json", "numbers"):
        prompts = examination.folder / "prompts"
        told = json.loads((prompts / "manifest.json").read_text())
        found = {name: examination.sha256(prompts / name) for name in ("train.jsonl", "eval.jsonl")}
        counts = {name.removesuffix(".jsonl"): len((prompts / name).read_text().splitlines()) for name in found}
        _compare(examination, "prompts/manifest.json", told["files"], found)
        _compare(examination, "prompts/manifest.json", {name: told["counts"][name] for name in counts}, counts)


def _check_metrics(examination: Examination, folder: str) -> None:
    rows = [json.loads(line) for line in (examination.folder / folder / "metrics.jsonl").read_text().splitlines()]
    config = examination.configs.get(folder.partition("/")[2])
    told = [row["update"] for row in rows]
    if config is not None and told != list(range(1, config.training.updates + 1)):
        examination.broken(
            f"{folder}/metrics.jsonl", "numbers", f"does not hold updates 1 to {config.training.updates}, each once",
            "train the run again",
        )  # fmt: skip


def _check_report(examination: Examination) -> None:
    if not examination.configs:
        examination.broken("report", "numbers", "no configuration is here to draw it again", "restore configs/")
        return
    runs = run_names(next(iter(examination.configs.values())))
    # Fetched by DVC, results come without the records of times and of lineage, of which the page shows a part.
    records = [f"runs/{run}/{name}" for run in runs for name in (PROVENANCE, "timing.jsonl")]
    whole = all(name in examination.files for name in records if not name.startswith("runs/base-"))
    same = _same_code(examination)
    with tempfile.TemporaryDirectory() as temporary:
        again = Path(temporary) / "report"
        try:
            build_report(_with_configs(examination, runs, Path(temporary) / "experiment"), runs, again)
        except ReportError as error:
            if whole:
                raise
            examination.remark(
                "report", "numbers", f"cannot be drawn again here: {error}", "audit it where it was made"
            )
            return
        for path in sorted(path for path in again.rglob("*") if path.is_file()):
            name = f"report/{path.relative_to(again).as_posix()}"
            told = examination.folder / name
            if not told.is_file() or (VOLATILE.fullmatch(name) and not whole):
                # A missing file is the record's or the anchor's to tell.
                continue
            if path.suffix == ".json":
                _compare(examination, name, json.loads(told.read_text()), json.loads(path.read_text()))
            elif path.suffix == ".csv":
                _compare(examination, name, _rows(told), _rows(path))
            elif told.read_bytes() != path.read_bytes():
                report = examination.broken if same else examination.remark
                advice = _AGAIN if same else "other code or libraries drew it; its numbers are those of report.json"
                report(name, "numbers", "is not what the report draws from the records beside it", advice)


def _with_configs(examination: Examination, runs: Sequence[str], view: Path) -> Path:
    """The experiment's folder with a configuration of every run: its own, or a view of it where it lacks some."""
    if all(f"configs/{run}.yaml" in examination.files for run in runs):
        return examination.folder
    (view / "configs").mkdir(parents=True)
    for run in runs:
        if run in examination.configs:
            (view / "configs" / f"{run}.yaml").write_text(dump_config(examination.configs[run]))
    for name in ("prompts", "runs", "evaluation"):
        (view / name).symlink_to(examination.folder / name)
    return view


def _same_code(examination: Examination) -> bool:
    record = examination.records.get("report")
    return record is not None and record["package_sha256"] == package_sha256() and record["versions"] == versions()


def _rows(path: Path) -> list[list[Any]]:
    with path.open(newline="") as stream:
        return [[_value(cell) for cell in row] for row in csv.reader(stream)]


def _value(cell: str) -> Any:
    try:
        return float(cell)
    except ValueError:
        return cell


def _compare(examination: Examination, name: str, told: Any, found: Any) -> None:
    """Make one finding of all values that differ by more than rounding."""
    differing = []
    for key, one, other in _leaves("", told, found):
        examination.numbers += 1
        if not _equal(one, other):
            differing.append(f"{key or 'value'} says {one!r}, computed again {other!r}")
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        examination.broken(
            name, "numbers", f"does not follow from what it was computed from: {'; '.join(differing[:3])}{more}", _AGAIN
        )


def _leaves(key: str, told: Any, found: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(told, dict) and isinstance(found, dict):
        for name in dict.fromkeys([*told, *found]):
            yield from _leaves(f"{key}.{name}" if key else name, told.get(name), found.get(name))
    elif isinstance(told, list) and isinstance(found, list) and len(told) == len(found):
        for index, (one, other) in enumerate(zip(told, found, strict=True)):
            yield from _leaves(f"{key}[{index}]", one, other)
    else:
        yield key, told, found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(one) and math.isnan(other))
    return type(one) is type(other) and one == other
