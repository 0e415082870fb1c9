"""A measurement as text for the terminal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType

from vipo.credit.costs import Costs
from vipo.credit.meter.result import Along, Result
from vipo.credit.meter.statistics import Estimate

COSTS: Mapping[str, str] = MappingProxyType({field.name: field.name.replace("_", " ") for field in fields(Costs)})
"""What is counted of a source, and what readers see."""


def table(result: Result, size: str, confidence: float = 0.95) -> str:
    """Both estimators by source and direction, then what they rest on.

    Args:
        size: in what the steps were equal, as the plan has it.
        confidence: of the intervals.
    """
    lines = []
    if result.pathwise:
        lines += [
            f"pathwise: cosine of one update's direction with the gradient of the expected reward "
            f"({result.updates} updates, {result.reference_batches} reference batches)",
            *_rows(result.pathwise, result.first, "cosine"),
            "",
        ]
    if result.directional:
        change = "" if result.change is None else f", each changing the policy by {result.change:.3g} ({size})"
        lines += [
            f"directional: gain of the held-out reward by one step ({result.stepped} updates{change})",
            *_rows(result.directional, result.first, "gain"),
            "",
        ]
    if result.steps:
        lines += [
            "by transition (sgd; step 0 begins at pure noise): share of the gain, in percent",
            *_steps(result),
            "",
        ]
    if result.costs:
        lines += ["cost of each sample, beyond sampling, decoding and scoring it once", *_costs(result), ""]
    lines += _notes(result, confidence)
    return "\n".join(lines)


def _rows(found: Sequence[Along], first: str, value: str) -> list[str]:
    width = max(len("source"), *(len(along.source) for along in found))
    rows = [f"  {'source':<{width}}  {'direction':<9}  {value:>22}  {'ratio to ' + first:>22}"]
    for along in found:
        ratio = "1" if along.source == first else shown(along.ratio, 2)
        ratio = f"({ratio})" if is_weak(found, first, along.kind) else ratio
        rows.append(f"  {along.source:<{width}}  {along.kind:<9}  {shown(along.value, 4):>22}  {ratio:>22}")
    return rows


def is_weak(found: Sequence[Along], first: str, kind: str) -> bool:
    """Whether the first source's own value may be zero along that direction, so that ratios to it say little."""
    return kind in _weak(found, first)


def _weak(found: Sequence[Along], first: str) -> list[str]:
    """Directions in which the first source's own value may be zero."""
    own = [along for along in found if along.source == first]
    return [along.kind for along in own if along.value.error is None or not along.value.tells_sign]


def _steps(result: Result) -> list[str]:
    steps = sorted({at.step for at in result.steps})
    sources = list(dict.fromkeys(at.source for at in result.steps))
    width = max(map(len, sources))
    rows = ["  " + " " * width + "".join(f"{step:>12}" for step in steps)]
    for source in sources:
        shares = {at.step: at.share for at in result.steps if at.source == source}
        cells = (percent(shares[step]) for step in steps)
        rows.append(f"  {source:<{width}}" + "".join(f"{cell:>12}" for cell in cells))
    return rows


def _costs(result: Result) -> list[str]:
    names = [name for name in COSTS if any(name in counted for counted in result.costs.values())]
    width = max(len("source"), *map(len, result.costs))
    heads = "".join(f"{COSTS[name]:>18}" for name in names)
    rows = [f"  {'source':<{width}}{heads}" if names else "  none"]
    for source, counted in result.costs.items() if names else ():
        rows.append(f"  {source:<{width}}" + "".join(f"{counted.get(name, 0):>18}" for name in names))
    return rows


def _notes(result: Result, confidence: float) -> list[str]:
    notes = [f"± is half of the {100 * confidence:g} % interval (jackknife over updates and reference units)."]
    for name, found in (("pathwise", result.pathwise), ("directional", result.directional)):
        if weak := _weak(found, result.first):
            notes.append(
                f"In brackets: {result.first} itself cannot be told from zero ({name}: {', '.join(weak)}), so a ratio "
                "to it says little yet; measure more."
            )
    if result.reliability is not None and not math.isnan(result.reliability):
        notes.append(f"Two halves of the reference agree with cosine {result.reliability:.2f}.")
    if result.agreement is not None:
        slope = shown(result.agreement.slope, 2)
        notes.append(
            f"Over {result.agreement.steps} steps, the gain found is {slope} times what the pathwise gradient predicts "
            f"(1: both estimators agree); correlation {result.agreement.correlation:.2f}."
        )
    if result.needed is not None:
        needed = result.needed
        notes.append(
            f"For a ratio to within {needed.width:g} ({needed.source}, {needed.kind}): about {needed.updates} updates "
            f"and {needed.units} {needed.of}."
        )
    return notes


def shown(estimate: Estimate, digits: int) -> str:
    """A value and half of its interval."""
    if estimate.value != estimate.value:
        return "not known"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.{digits}f}"
    return f"{estimate.value:.{digits}f} ± {(estimate.high - estimate.low) / 2:.{digits}f}"


def percent(estimate: Estimate) -> str:
    """A share and half of its interval, in percent."""
    if estimate.value != estimate.value:
        return "-"
    half = "" if estimate.low is None or estimate.high is None else f" ± {50 * (estimate.high - estimate.low):.0f}"
    return f"{100 * estimate.value:.0f}{half}"
