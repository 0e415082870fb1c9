"""Every number that is drawn from scores, computed again by the library's own functions."""

import csv
import io
import json
import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from vipo.audit.examination import Examination
from vipo.evaluation.summary import summarize
from vipo.provenance.environment import package_sha256, versions
from vipo.provenance.files import text_lines
from vipo.stages import run_names


def check_numbers(examination: Examination) -> None:
    """Manifest from prompts, summaries from scores, report from everything; metrics for being whole."""
    _check_manifest(examination)
    for folder, stage in examination.stages().items():
        if stage == "score":
            with examination.guarded(f"{folder}/summary.json", "numbers"):
                scores = pd.read_parquet(examination.folder / folder / "scores.parquet")
                told = json.loads((examination.folder / folder / "summary.json").read_text("utf-8"))
                _compare(examination, f"{folder}/summary.json", told, summarize(scores))
        elif stage == "train":
            with examination.guarded(f"{folder}/metrics.jsonl", "numbers"):
                _check_metrics(examination, folder)
    if "report/data" in examination.stages():
        with examination.guarded("report/data", "numbers"):
            _check_report(examination)


def _check_manifest(examination: Examination) -> None:
    if "prompts/manifest.json" not in examination.files:
        return
    with examination.guarded("prompts/manifest.json", "numbers"):
        prompts = examination.folder / "prompts"
        told = json.loads((prompts / "manifest.json").read_text("utf-8"))
        found = {name: examination.sha256(prompts / name) for name in ("train.jsonl", "eval.jsonl")}
        counts = {name.removesuffix(".jsonl"): len(text_lines((prompts / name).read_text("utf-8"))) for name in found}
        _compare(examination, "prompts/manifest.json", told["files"], found)
        _compare(examination, "prompts/manifest.json", {name: told["counts"][name] for name in counts}, counts)


def _check_metrics(examination: Examination, folder: str) -> None:
    rows = [json.loads(line) for line in text_lines((examination.folder / folder / "metrics.jsonl").read_text("utf-8"))]
    config = examination.configs.get(folder.partition("/")[2])
    told = [row["update"] for row in rows]
    if config is not None and told != list(range(1, config.training.updates + 1)):
        examination.broken(
            f"{folder}/metrics.jsonl", "numbers", f"does not hold updates 1 to {config.training.updates}, each once",
            "train the run again",
        )  # fmt: skip


def _check_report(examination: Examination) -> None:
    config = examination.reported
    if config is None:
        examination.broken(
            "report/data",
            "numbers",
            "the configuration that it was made with is not here",
            "run 'vipo summarize' again",
        )
        return
    # Figures and pictures need libraries that take longer to load than all other checks to run.
    from vipo.reporting import report_files

    whole = "report" in examination.records
    for path, text in report_files(examination.folder, run_names(config), config).items():
        name = f"report/{path}"
        # A missing file is the record's or the anchor's to tell; and the page of results that were pulled is none.
        if name in examination.files and (whole or path.startswith("data/")):
            with examination.guarded(name, "numbers"):
                _compare_file(examination, name, text)


def _compare_file(examination: Examination, name: str, again: str) -> None:
    # As bytes: line ends are the file's own.
    told = (examination.folder / name).read_bytes().decode()
    if name.endswith(".json"):
        _compare(examination, name, json.loads(told), json.loads(again))
    elif name.endswith(".csv"):
        _compare(examination, name, _rows(told), _rows(again))
    elif told != again:
        _differs(examination, name, "is not what is drawn from the results beside it")


def _differs(examination: Examination, name: str, message: str) -> None:
    """Broken where this code wrote the file; another code's numbers and figures may be others for the same results."""
    folder = max((folder for folder in examination.stages() if name.startswith(f"{folder}/")), key=len)
    record = examination.records.get(folder)
    if record is None:
        # Of results that were pulled, the anchor says that they are as they were written; by which code, nothing.
        ours = not examination.is_anchored(name)
    else:
        ours = record["package_sha256"] == package_sha256() and record["versions"] == versions()
    if ours:
        examination.broken(name, "numbers", message, "restore it, or run the stage that writes it again")
    else:
        message += ", by the code and libraries that are here"
        examination.remark(name, "numbers", message, "audit it with the code that made it")


def _rows(text: str) -> list[list[Any]]:
    return [[_value(cell) for cell in row] for row in csv.reader(io.StringIO(text, newline=""))]


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
        _differs(examination, name, f"does not follow from the results beside it: {'; '.join(differing[:3])}{more}")


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
