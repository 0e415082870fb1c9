"""A measurement as its file has it, read again."""

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from vipo.credit.meter.gradients import MeterError
from vipo.credit.meter.result import Result
from vipo.credit.meter.statistics import Estimate
from vipo.text import shortened


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
        data = _read_finite(path)
        stored = _FILE.validate_python({**data["meter"], "result": _with_nan(data["result"])})
        _check(stored.result)
        return stored
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split()) if isinstance(error, ValueError) else repr(error)
        raise MeterError(
            f"{path}: no measurement that this vipo reads ({shortened(reason, 300)}); run 'vipo credit' again"
        ) from error


def _read_finite(path: Path) -> Any:
    """JSON of a file without NaN and infinities, which Python's writer has and JSON has not.

    Raises:
        OSError, ValueError, RecursionError: it cannot be read, or is none.
    """
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refused)


def _refused(constant: str) -> float:
    raise ValueError(f"it holds {constant}")


_FILE = TypeAdapter(Stored)


def _with_nan(found: Any) -> Any:
    """What is not finite was written as null: of an estimate that is its value."""
    if isinstance(found, list):
        return [_with_nan(own) for own in found]
    if not isinstance(found, dict):
        return found
    lost = "update_share" in found and found.get("value", 0) is None
    return {key: _with_nan(own) for key, own in found.items()} | ({"value": math.nan} if lost else {})


def _check(result: Result) -> None:
    """Whoever shows it looks for each source in each direction and transition."""
    for name, found in (("pathwise", result.pathwise), ("directional", result.directional)):
        pairs = [(along.source, along.kind) for along in found]
        every = itertools.product(
            dict.fromkeys(kind for _, kind in pairs), dict.fromkeys(source for source, _ in pairs)
        )
        if pairs != [(source, kind) for kind, source in every] or (pairs and pairs[0][0] != result.first):
            raise ValueError(f"{name}: its sources and directions are not each with each")
    steps = [(at.source, at.step) for at in result.steps]
    sources, numbers = (dict.fromkeys(pair[place] for pair in steps) for place in (0, 1))
    if steps != list(itertools.product(sources, numbers)):
        raise ValueError("steps: its sources and transitions are not each with each")
    shown = [own for along in (*result.pathwise, *result.directional) for own in vars(along).values()]
    shown += [own for at in result.steps for own in vars(at).values()]
    if any(
        len({own.error is None, own.low is None, own.high is None}) > 1 for own in shown if isinstance(own, Estimate)
    ):
        raise ValueError("an interval has one end")
