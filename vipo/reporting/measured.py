"""The page's section on what credit is worth: the measurements that the experiment asks for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vipo.config.meter import MeterConfig, measurement_label
from vipo.credit.meter.result import Along, Result
from vipo.credit.meter.stored import read_stored
from vipo.credit.meter.table import COSTS, is_weak, percent, shown
from vipo.reporting.credit import draw_credit
from vipo.reporting.sections.context import drawn


def measurement_files(experiment: Path, meter: MeterConfig | None) -> list[Path]:
    """The files that `credit_section` reads: of the checkpoints that are measured."""
    return [path for _, path in _places(experiment, meter) if path.is_file()]


def credit_section(experiment: Path, meter: MeterConfig | None) -> dict[str, Any] | None:
    """What the template ``sections/credit.html.j2`` shows; None where the experiment measures nothing.

    Raises:
        MeterError: a measurement cannot be read.
    """
    if meter is None:
        return None
    places = _places(experiment, meter)
    return {
        "measured": [_measured(checkpoint, path) for checkpoint, path in places if path.is_file()],
        "missing": [checkpoint for checkpoint, path in places if not path.is_file()],
    }


def _places(experiment: Path, meter: MeterConfig | None) -> list[tuple[str, Path]]:
    names = () if meter is None else meter.checkpoints
    return [(name, experiment / "credit" / measurement_label(name) / "credit.json") for name in names]


def _measured(checkpoint: str, path: Path) -> dict[str, Any]:
    stored = read_stored(path)
    result = stored.result
    whole = f"{result.updates} updates, {result.reference_batches} reference batches"
    stepped = f"{result.stepped} updates, steps of equal {stored.size}"
    estimators = [
        ("pathwise", "cosine", whole, result.pathwise),
        ("directional", "gain", stepped, result.directional),
    ]
    return {
        "checkpoint": checkpoint,
        "first": result.first,
        "confidence": f"{100 * stored.confidence:g}",
        "figure": drawn(draw_credit(result, stored.confidence)),
        "estimators": [
            {"name": name, "value": value, "rests_on": rests_on, "rows": _rows(found, result.first)}
            for name, value, rests_on, found in estimators
            if found
        ],
        "steps": _steps(result),
        "costs": _costs(result),
        "needed": result.needed,
    }


def _rows(found: Sequence[Along], first: str) -> list[dict[str, Any]]:
    return [
        {
            "source": along.source,
            "kind": along.kind,
            "value": shown(along.value, 4),
            "ratio": "1" if along.source == first else shown(along.ratio, 2),
            "weak": is_weak(found, first, along.kind),
        }
        for along in found
    ]


def _steps(result: Result) -> dict[str, Any] | None:
    if not result.steps:
        return None
    sources = dict.fromkeys(at.source for at in result.steps)
    return {
        "numbers": sorted({at.step for at in result.steps}),
        "rows": [(name, [percent(at.share) for at in result.steps if at.source == name]) for name in sources],
    }


def _costs(result: Result) -> dict[str, Any] | None:
    names = [name for name in COSTS if any(name in counted for counted in result.costs.values())]
    if not names:
        return None
    rows = [(source, [f"{counted.get(name, 0):,}" for name in names]) for source, counted in result.costs.items()]
    return {"heads": [COSTS[name] for name in names], "rows": rows}
