"""The meter's intervals: against explicit loops, and by their coverage on data of known truth."""

import math

import numpy as np
import pytest
from scipy import stats

from vipo.credit.meter.statistics import factor_for, jackknife, mean_over, split_reliability, squared_norm


def _data(sources: int = 3, updates: int = 7, units: int = 5) -> np.ndarray:
    return np.random.default_rng(0).normal(1.0, 1.0, (sources, updates, units))


def test_jackknife_equals_the_explicit_loop() -> None:
    data, weights = _data(), [2.0, 1.0, 1.0, 1.0, 3.0]

    def ratio(u: np.ndarray, b: np.ndarray) -> np.ndarray:
        means = mean_over(data, u, b)
        return means[1:] / means[0]

    found = jackknife(ratio, 7, weights)

    def by_hand(source: int, updates: list[int], units: list[int]) -> float:
        def mean(s: int) -> float:
            top = sum(weights[b] * data[s, u, b] for u in updates for b in units)
            return top / (len(updates) * sum(weights[b] for b in units))

        return mean(source) / mean(0)

    all_u, all_b = list(range(7)), list(range(5))
    for place, source in enumerate((1, 2)):
        parts = []
        for n, leave in (
            (7, lambda i, s: by_hand(s, [u for u in all_u if u != i], all_b)),
            (5, lambda i, s: by_hand(s, all_u, [b for b in all_b if b != i])),
        ):
            left = [leave(i, source) for i in range(n)]
            parts.append((n - 1) / n * sum((value - sum(left) / n) ** 2 for value in left))
        assert found[place].value == pytest.approx(by_hand(source, all_u, all_b))
        assert found[place].error == pytest.approx(math.sqrt(sum(parts)))
        assert found[place].update_share == pytest.approx(parts[0] / sum(parts))
        freedom = sum(parts) ** 2 / (parts[0] ** 2 / 6 + parts[1] ** 2 / 4)
        half = stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts))
        assert found[place].high == pytest.approx(found[place].value + half)


def test_the_ratio_of_a_source_to_itself_is_exactly_one() -> None:
    data = _data()
    (found,) = jackknife(lambda u, b: mean_over(data[:1], u, b) / mean_over(data[0], u, b), 7, [1.0] * 5)
    assert (found.value, found.error, found.low, found.high) == (1.0, 0.0, 1.0, 1.0)


def test_of_a_mean_it_is_the_standard_error() -> None:
    """With the reference without spread, the classical error of a mean."""
    rows = np.random.default_rng(1).normal(size=9)
    data = np.repeat(rows[:, None], 4, axis=1)
    (found,) = jackknife(lambda u, b: mean_over(data[None], u, b), 9, [1.0] * 4)
    assert found.error == pytest.approx(stats.sem(rows))
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 8, rows.mean(), stats.sem(rows)))


def test_intervals_cover_the_truth() -> None:
    """Random effects of updates and of reference units; the truth is 1. About 95 of 100 intervals hold it."""
    rng, held = np.random.default_rng(2), 0
    for _ in range(300):
        data = 1 + rng.normal(size=(1, 10, 1)) + rng.normal(size=(1, 1, 8)) + rng.normal(size=(1, 10, 8))
        (found,) = jackknife(lambda u, b, data=data: mean_over(data, u, b), 10, [1.0] * 8)
        held += found.low <= 1 <= found.high
    assert 270 <= held <= 298


def test_one_unit_tells_no_interval() -> None:
    data = _data(updates=1)
    found = jackknife(lambda u, b: mean_over(data, u, b), 1, [1.0] * 5)[0]
    assert found.error is None
    assert not found.tells_sign
    assert factor_for(found, 0.1) is None


def test_four_times_the_data_halve_the_width() -> None:
    data = _data()
    (found,) = jackknife(lambda u, b: mean_over(data[:1], u, b), 7, [1.0] * 5)
    half = stats.norm.ppf(0.975) * found.error
    assert factor_for(found, half / 2) == pytest.approx(4.0)


def test_reliability_and_norm_of_known_gradients() -> None:
    """Units that share a signal of length 1: the mean of different units' products is its square."""
    rng = np.random.default_rng(3)
    signal = np.zeros(400)
    signal[0] = 1.0
    noise = rng.normal(0, 0.1, (8, 400))
    gram = (signal + noise) @ (signal + noise).T
    first, second = (signal + noise)[:4].mean(axis=0), (signal + noise)[4:].mean(axis=0)
    one = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert split_reliability(gram) == pytest.approx(one, abs=0.1)
    assert split_reliability(np.eye(4)) == 0.0
    assert split_reliability(np.ones((5, 5))) == pytest.approx(1.0)
    assert math.isnan(split_reliability(np.ones((1, 1))))
    by_hand = sum(gram[b, c] for b in range(8) for c in range(8) if b != c) / 56
    assert squared_norm(gram, np.ones(8)) == pytest.approx(by_hand)
    assert squared_norm(gram, np.ones(8)) == pytest.approx(1.0, abs=0.2)
    assert math.isnan(squared_norm(gram, np.array([1.0] + [0.0] * 7)))
