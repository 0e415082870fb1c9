"""A measurement as its file has it, read again."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vipo.credit.meter.gradients import MeterError
from vipo.credit.meter.result import Agreement, Along, AtStep, Needed, Result
from vipo.credit.meter.statistics import Estimate


@dataclass(frozen=True)
class Stored:
    """A measurement: what was found, and the settings that a reader of it needs.

    Attributes:
        size: in what the steps of the directional estimator were equal.
        confidence: of the intervals.
    """

    result: Result
    size: str
    confidence: float


def read_stored(path: Path) -> Stored:
    """Read ``credit.json``.

    Raises:
        MeterError: it is no measurement, or one of another vipo.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        meter, found = data["meter"], dict(data["result"])
        agreement, needed = found["agreement"], found["needed"]
        lists = {
            "pathwise": [_along(row) for row in found["pathwise"]],
            "directional": [_along(row) for row in found["directional"]],
            "steps": [
                AtStep(row["source"], row["step"], _estimate(row["cosine"]), _estimate(row["share"]))
                for row in found["steps"]
            ],
            "agreement": agreement and Agreement(**(agreement | {"slope": _estimate(agreement["slope"])})),
            "needed": needed and Needed(**needed),
        }
        return Stored(Result(**(found | lists)), meter["size"], meter["confidence"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MeterError(f"{path}: no measurement that this vipo reads ({error!r}); run 'vipo credit' again") from error


def _along(row: Mapping[str, Any]) -> Along:
    estimates = (_estimate(row[name]) for name in ("value", "ratio", "difference"))
    return Along(row["source"], row["kind"], *estimates)


def _estimate(row: Mapping[str, Any]) -> Estimate:
    # What is not finite was written as null.
    value = math.nan if row["value"] is None else row["value"]
    return Estimate(value, row["error"], row["low"], row["high"], row["update_share"])
