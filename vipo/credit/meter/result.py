"""From the records of a measurement to estimates: cosines, gains, ratios to the first source, and what is missing."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from vipo.credit.meter.plan import Record, Reference
from vipo.credit.meter.statistics import (
    Array,
    Estimate,
    factor_for,
    jackknife,
    mean_over,
    split_reliability,
    squared_norm,
)


@dataclass(frozen=True)
class Along:
    """One source and kind of direction, by one estimator.

    Attributes:
        source, kind: which.
        value: pathwise, the mean cosine of one update's direction with the gradient of the expected reward, its noise
            taken out; directional, the mean gain of the held-out reward by one step.
        ratio: of the value to the first source's; 1 for that itself.
        difference: of the value to the first source's.
    """

    source: str
    kind: str
    value: Estimate
    ratio: Estimate
    difference: Estimate


@dataclass(frozen=True)
class AtStep:
    """One source's contribution of one transition, pathwise, along the gradient itself.

    Attributes:
        source, step: which; step 0 begins at pure noise.
        cosine: of the mean of what the transition adds to an update.
        share: of the whole direction's gain, what the transition contributes; the shares of a source sum to 1.
    """

    source: str
    step: int
    cosine: Estimate
    share: Estimate


@dataclass(frozen=True)
class Agreement:
    """Gains that the pathwise gradient predicts of the very steps that were taken, against those found.

    Attributes:
        slope: mean found by mean predicted gain; 1 where both estimators agree: the step is small, and the reward has
            no jumps, which gradients do not see.
        correlation: over updates, sources and kinds.
        steps: how many.
    """

    slope: Estimate
    correlation: float
    steps: int


Units = Literal["reference batches", "held-out prompts"]


@dataclass(frozen=True)
class Needed:
    """What an interval of half-width `width` of a ratio would take, by the errors so far.

    Attributes:
        source, kind: of the ratio with the widest interval.
        updates, units: in all, not in addition.
        of: what the units are, by the estimator: reference batches (pathwise), or where there are none, held-out
            prompts (directional; the updates are those along which steps are taken).
    """

    width: float
    source: str
    kind: str
    updates: int
    units: int
    of: Units


@dataclass(frozen=True)
class Result:
    """What a measurement found.

    Attributes:
        first: the source that the others are compared with.
        updates, reference_batches, stepped: how much was measured.
        reliability: mean cosine of the two halves of the reference; None without one.
        reference_length: length of the gradient of the expected reward, its noise taken out; None where it is lost in
            that noise.
        pathwise, directional: by source and kind.
        steps: by source and transition.
        agreement: of both estimators; None where one is missing.
        change: what every step changed, in the units of the plan's size.
        needed: None where it cannot be told.
        costs: by source, what it takes of each sample beyond sampling, decoding and scoring it once; what is 0 is left
            out.
    """

    first: str
    updates: int
    reference_batches: int
    stepped: int
    reliability: float | None
    reference_length: float | None
    pathwise: list[Along]
    directional: list[Along]
    steps: list[AtStep]
    agreement: Agreement | None
    change: float | None
    needed: Needed | None
    costs: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For ``json.dumps``; what is not finite is None."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def summarise(
    records: Sequence[Record], reference: Reference | None, width: float = 0.3, confidence: float = 0.95
) -> Result:
    """Estimates with intervals from what was measured so far.

    Args:
        records: of at least one update.
        reference: None where there is none.
        width: half-width of the interval of a ratio that `needed` is about.
        confidence: of the intervals.
    """
    names = list(records[0]["sources"])
    kinds = list(records[0]["sources"][names[0]]["kinds"])
    pairs = [(name, kind) for kind in kinds for name in names]
    stepped = [record for record in records if "step" in record["sources"][names[0]]["kinds"][kinds[0]]]
    pathwise, steps, reliability, length = [], [], None, None
    if reference is not None:
        gram, groups = reference.gram.numpy(), [float(count) for count in reference.batches]
        reliability, square = split_reliability(gram), squared_norm(gram, np.asarray(groups))
        length = math.sqrt(square) if square > 0 else None
        values = _gathered(records, pairs, lambda found: found["products"])
        pathwise = _compared(values, pairs, len(names), groups, confidence, gram)
        steps = _by_step(records, names, groups, gram, confidence)
    directional = []
    if stepped:
        gains = _gathered(stepped, pairs, lambda found: found["step"]["gains"])
        directional = _compared(gains, pairs, len(names), [1.0] * gains.shape[-1], confidence, None)
    return Result(
        names[0],
        len(records),
        0 if reference is None else sum(reference.batches),
        len(stepped),
        reliability,
        length,
        pathwise,
        directional,
        steps,
        _agreement(stepped, pairs, reference, confidence),
        next((record["change"] for record in stepped if record["change"] is not None), None),
        _needed(pathwise, directional, names[0], len(records), stepped, reference, width, confidence),
    )


def _gathered(
    records: Sequence[Record], pairs: Sequence[tuple[str, str]], read: Callable[[Record], list[float]]
) -> Array:
    """``(pairs, updates, units)``."""
    return np.array(
        [[read(record["sources"][name]["kinds"][kind]) for record in records] for name, kind in pairs], dtype=np.float64
    )


def _compared(
    values: Array,
    pairs: Sequence[tuple[str, str]],
    sources: int,
    units: Sequence[float],
    confidence: float,
    gram: Array | None,
) -> list[Along]:
    """Estimates of each pair, the first `sources` pairs being of one kind, the next of another.

    Args:
        gram: of the reference, by whose length cosines are divided; None: values as they are.
    """
    count, first = len(pairs), np.repeat(np.arange(0, len(pairs), sources), sources)

    def statistic(updates: Array, reference: Array) -> Array:
        means = mean_over(values, updates, reference)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(first == np.arange(count), 1.0, means / means[first])
            scaled = means if gram is None else means / math.sqrt(max(squared_norm(gram, reference), 0.0) or math.nan)
        return np.concatenate([scaled, ratios, scaled - scaled[first]])

    found = jackknife(statistic, values.shape[1], units, confidence)
    return [
        Along(name, kind, found[place], found[count + place], found[2 * count + place])
        for place, (name, kind) in enumerate(pairs)
    ]


def _by_step(
    records: Sequence[Record], names: Sequence[str], units: Sequence[float], gram: Array, confidence: float
) -> list[AtStep]:
    result = []
    for name in names:
        steps = list(records[0]["sources"][name]["steps"])
        own = [[record["sources"][name]["steps"][step] for step in steps] for record in records]
        # (steps, updates, units): of a whole direction of length 1, what each transition contributes.
        raw = np.array([[row[place]["products"] for row in own] for place in range(len(steps))], dtype=np.float64)
        norms = np.array([[row[place]["norm"] for row in own] for place in range(len(steps))], dtype=np.float64)
        lengths = np.array([record["sources"][name]["norm"] for record in records], dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            unit = np.where(norms[..., None] > 0, raw / norms[..., None], 0.0)
            part = np.where(lengths[None, :, None] > 0, raw / lengths[None, :, None], 0.0)

        def statistic(updates: Array, reference: Array, unit: Array = unit, part: Array = part) -> Array:
            shares = mean_over(part, updates, reference)
            length = math.sqrt(max(squared_norm(gram, reference), 0.0) or math.nan)
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.concatenate([mean_over(unit, updates, reference) / length, shares / shares.sum()])

        found = jackknife(statistic, len(records), units, confidence)
        result += [AtStep(name, int(step), found[place], found[len(steps) + place]) for place, step in enumerate(steps)]
    return result


def _agreement(
    stepped: Sequence[Record], pairs: Sequence[tuple[str, str]], reference: Reference | None, confidence: float
) -> Agreement | None:
    if reference is None or not stepped:
        return None
    gains = _gathered(stepped, pairs, lambda own: own["step"]["gains"]).mean(axis=-1)
    predicted = _gathered(stepped, pairs, lambda own: own["step"]["predicted"])

    def slope(updates: Array, units: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio: Array = (gains.mean(axis=0) @ updates) / mean_over(predicted.mean(axis=0), updates, units)
        return np.atleast_1d(ratio)

    weights = np.asarray(reference.batches, dtype=np.float64)
    foreseen = (predicted @ (weights / weights.sum())).reshape(-1)
    if foreseen.std() == 0 or gains.std() == 0:
        return None
    correlation = float(np.corrcoef(gains.reshape(-1), foreseen)[0, 1])
    return Agreement(jackknife(slope, len(stepped), weights.tolist(), confidence)[0], correlation, len(foreseen))


def _needed(
    pathwise: Sequence[Along],
    directional: Sequence[Along],
    first: str,
    updates: int,
    stepped: Sequence[Record],
    reference: Reference | None,
    width: float,
    confidence: float,
) -> Needed | None:
    factors = [
        (factor, along)
        for along in pathwise or directional
        if along.source != first and (factor := factor_for(along.ratio, width, confidence)) is not None
    ]
    if not factors:
        return None
    factor, widest = max(factors, key=lambda pair: pair[0])
    if reference is not None:
        counts = updates, sum(reference.batches)
    else:
        gains = stepped[0]["sources"][first]["kinds"][widest.kind]["step"]["gains"]
        counts = len(stepped), len(gains)
    more, units = (math.ceil(factor * count) for count in counts)
    of: Units = "held-out prompts" if reference is None else "reference batches"
    return Needed(width, widest.source, widest.kind, more, units, of)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_plain(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
