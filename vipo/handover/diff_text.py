"""The comparison of two runs as text: Markdown tables."""

import json
import re
from collections.abc import Iterator, Sequence

from vipo.evaluation.statistics import decimals
from vipo.handover.diff import RunDiff
from vipo.handover.diff_outcome import Evaluation, Training

_DIGEST = re.compile(r"[0-9a-f]{40,}\Z")
_DIGEST_SHOWN = 12


def render_diff(diff: RunDiff) -> str:
    """The comparison as Markdown tables, hashes shortened."""
    inert = sum(row.decides == "nothing" for row in diff.config)
    lines = [f"A: {diff.a}", f"B: {diff.b}"]
    lines += [f"note: {note}" for note in diff.notes]
    lines += _section(f"Configuration: {_count(diff.config, 'key')}" + (f", {inert} of no effect" if inert else ""))
    lines += _table(("key", "A", "B", "decides"), [(row.key, row.a, row.b, row.decides) for row in diff.config])
    alone = f" (stage {diff.recorded[0]} alone)" if len(diff.recorded) == 1 else ""
    for title, what, rows in (
        ("Code", "fact", diff.code),
        ("Environment", "fact", diff.environment),
        ("Data", "file", diff.data),
    ):
        if rows is None:
            lines += _section(f"{title}: not recorded here")
            continue
        lines += _section(f"{title}{alone}: {_count(rows, what)}")
        lines += _table((what, "A", "B", "stage"), [(row.key, row.a, row.b, " ".join(row.stages)) for row in rows])
    if diff.training is not None:
        lines += _section("Training: metrics of the last update")
        lines += _training_lines(diff.training)
    if diff.evaluation is not None:
        lines += _section("Evaluation: held-out scores of the final weights")
        lines += _evaluation_lines(diff.evaluation)
    return "\n".join(lines) + "\n"


def _section(title: str) -> list[str]:
    return ["", f"## {title}"]


def _count(rows: Sequence[object], what: str) -> str:
    return "no difference" if not rows else f"{len(rows)} {what}{'s differ' if len(rows) > 1 else ' differs'}"


def _training_lines(training: Training) -> Iterator[str]:
    first, second = training.updates
    weights = {True: "the same", False: "different", None: "not known: a run has none here"}[training.same_weights]
    equal = training.equal_updates
    ends = f"differ from update {equal + 1} on" if equal < min(first, second) else f"are equal in {equal} updates"
    yield f"Updates: {first} in A, {second} in B; the metrics that both have {ends}."
    yield f"Final weights: {weights}."
    rows = []
    for row in (metric for metric in training.metrics if not metric.metric.startswith("clip/share_t")):
        change = None if row.a is None or row.b is None else row.b - row.a
        rows.append((row.metric, *(None if value is None else f"{value:.4g}" for value in (row.a, row.b, change))))
    yield from _table(("metric", "A", "B", "B - A"), rows)


def _evaluation_lines(evaluation: Evaluation) -> Iterator[str]:
    paired = "paired by prompt and noise" if evaluation.unpaired is None else f"NOT paired ({evaluation.unpaired})"
    yield f"Differences are {paired}; {evaluation.confidence:.0%} intervals, {evaluation.note}."
    rows = []
    for row in evaluation.scores:
        digits = decimals(row.difference, row.low, row.high)
        limits = f"[{row.low:+.{digits}f}, {row.high:+.{digits}f}]"
        name = row.column if row.better is None else f"{row.column} (trained)"
        name += f" (samples left out: {row.left_out})" if row.left_out else ""
        rows.append((name, f"{row.a:.4g}", f"{row.b:.4g}", f"{row.difference:+.{digits}f}", limits, row.verdict))
    yield from _table(("score", "A", "B", "B - A", "interval", "B is"), rows)
    if evaluation.missing:
        yield f"Not of both runs: {', '.join(evaluation.missing)}."


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table whose columns are aligned; nothing without rows."""
    if not rows:
        return []
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else "null" if value is None else json.dumps(value, ensure_ascii=False)
    text = f"{text[:_DIGEST_SHOWN]}…" if _DIGEST.match(text) else text
    return " ".join(text.split()).replace("|", "\\|")
