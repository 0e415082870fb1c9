"""Means over two independent samples, their ratios, and jackknife intervals.

Every estimate of the meter is a mean over updates and over reference units (`Pairs`): a direction comes from one
update, what it is worth is told by prompts and noise that the update never saw. Both are random, so an interval is a
jackknife over both: the two-sample jackknife, whose variance is the sum of each sample's own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]
Statistic = Callable[[Array, Array], Array]
"""Of weights of the updates and of the reference units, each summing to 1: the estimates."""


@dataclass(frozen=True)
class Estimate:
    """One number with its interval.

    Attributes:
        value: the estimate from all of the data.
        error: its standard error; None where it cannot be told (fewer than two updates or reference units).
        low, high: the interval; None with `error`.
        update_share: of the variance, what the updates contribute; the rest is the reference's.
    """

    value: float
    error: float | None
    low: float | None
    high: float | None
    update_share: float | None

    @property
    def tells_sign(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def mean_over(values: Array, updates: Array, reference: Array) -> Array:
    """``sum_ub w_u v_b x_..ub``: ``(..., U, B)`` to ``(...)``."""
    # einsum without a contraction path runs no BLAS: the sums do not depend on the number of threads.
    return np.einsum("...ub,u,b->...", values, updates, reference)


def jackknife(
    statistic: Statistic, updates: int, reference: Sequence[float], confidence: float = 0.95
) -> list[Estimate]:
    """Estimates with jackknife intervals over both samples.

    ``variance = sum over both of (n - 1) / n sum_i (theta_(i) - mean of theta_(i))^2``, where ``theta_(i)`` is computed
    without unit i. The interval is Student's, with the degrees of freedom of Welch and Satterthwaite.

    Args:
        statistic: of the weights of both samples; NaN where it is not defined.
        updates: how many updates there are.
        reference: weight of each reference unit, such as the number of groups in it.
        confidence: nominal coverage, in (0, 1).

    Source: Efron and Stein (1981), and Arvesen (1969) for two samples.
    """
    ones, units = np.ones(updates), np.asarray(reference, dtype=np.float64)
    whole = statistic(_without(ones), _without(units))
    unknown = np.full((2, len(whole)), np.nan)
    left = (
        [statistic(_without(ones, i), _without(units)) for i in range(updates)] if updates > 1 else unknown,
        [statistic(_without(ones), _without(units, i)) for i in range(len(units))] if len(units) > 1 else unknown,
    )
    variances = np.stack([_variance(np.stack(list(own))) for own in left])
    return [
        _estimate(float(value), variances[:, place], (updates, len(units)), confidence)
        for place, value in enumerate(whole)
    ]


def _variance(left: Array) -> Array:
    variance: Array = (len(left) - 1) / len(left) * ((left - left.mean(axis=0)) ** 2).sum(axis=0)
    return variance


def _without(weights: Array, unit: int | None = None) -> Array:
    kept = weights.copy()
    if unit is not None:
        kept[unit] = 0
    return kept / kept.sum()


def _estimate(value: float, variances: Array, counts: tuple[int, int], confidence: float) -> Estimate:
    total = float(variances.sum())
    if not (math.isfinite(value) and math.isfinite(total)):
        return Estimate(value, None, None, None, None)
    if total == 0:
        return Estimate(value, 0.0, value, value, None)
    freedom = total**2 / sum(float(own) ** 2 / (count - 1) for own, count in zip(variances, counts, strict=True))
    error = math.sqrt(total)
    half = float(special.stdtrit(freedom, (1 + confidence) / 2)) * error
    return Estimate(value, error, value - half, value + half, float(variances[0]) / total)


def factor_for(estimate: Estimate, width: float, confidence: float = 0.95) -> float | None:
    """How many times as many updates and reference units an interval of half-width `width` needs.

    The variance of a mean falls with the number of its units; the normal quantile stands in for Student's, which falls
    with it as well. None where there is no standard error yet.
    """
    if estimate.error is None or not width > 0:
        return None
    return (float(special.ndtri((1 + confidence) / 2)) * estimate.error / width) ** 2


def split_reliability(gram: Array) -> float:
    """Mean cosine of the two halves' sums, over all (at most 200 evenly chosen) halvings of the units.

    Args:
        gram: ``(B, B)`` inner products of the units' gradients. Of an odd B each halving leaves one out in turn.

    Returns:
        In [-1, 1]; NaN for fewer than two units.
    """
    from itertools import combinations, islice

    count = len(gram)
    if count < 2:
        return math.nan
    half = count // 2
    total = math.comb(count, half)
    cosines = []
    for first in islice(combinations(range(count), half), 0, None, max(1, total // 200)):
        others = [unit for unit in range(count) if unit not in first]
        second = others[:half] if count % 2 == 0 else others[-half:]
        a, b = list(first), list(second)
        norms = gram[np.ix_(a, a)].sum() * gram[np.ix_(b, b)].sum()
        cosines.append(gram[np.ix_(a, b)].sum() / math.sqrt(norms) if norms > 0 else math.nan)
    return float(np.mean(cosines))


def squared_norm(gram: Array, weights: Array) -> float:
    """``|E G|^2`` without the noise of G: the mean of the products of different units, by weight.

    ``sum_{b != c} v_b v_c <G_b, G_c> / sum_{b != c} v_b v_c``; unbiased where units are independent, so it may come
    out below 0 where there is hardly a signal. NaN for fewer than two units with weight.
    """
    pairs = np.outer(weights, weights)
    np.fill_diagonal(pairs, 0)
    total = float(pairs.sum())
    return float((pairs * gram).sum()) / total if total > 0 else math.nan
