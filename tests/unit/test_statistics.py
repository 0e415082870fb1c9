"""Paired bootstrap, comparisons, matching and wording against closed forms, SciPy and simulation."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vipo.evaluation.matched import evaluation_curves, matched_reward
from vipo.evaluation.means import ScoresError, mean_score
from vipo.evaluation.statistics import (
    Interval,
    compare_arms,
    decimals,
    independent_difference,
    paired_difference,
    tail_probability,
    wording,
)


def table(values: np.ndarray, arm: str = "vipo", update: int = 10, final: bool = True) -> pd.DataFrame:
    """Scores `x` of shape (seeds, prompts, samples) as rows."""
    seeds, prompts, samples = np.indices(values.shape).reshape(3, -1)
    return pd.DataFrame(
        {
            "run": [f"{arm}-s{seed}" for seed in seeds],
            "arm": arm,
            "seed": seeds,
            "update": update,
            "final": final,
            "prompt_id": [f"p{prompt:03d}" for prompt in prompts],
            "sample": samples,
            "x": values.ravel(),
        }
    )


def base(prompts: int, samples: int = 1, value: float = 0.0) -> pd.DataFrame:
    return table(np.full((1, prompts, samples), value), "base", update=0)


@given(shift=st.floats(-5, 5), seeds=st.integers(1, 7), prompts=st.integers(2, 9), samples=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_a_constant_difference_has_a_zero_width_interval(shift: float, seeds: int, prompts: int, samples: int) -> None:
    noise = np.random.default_rng(0).normal(size=(1, prompts, samples))
    interval = paired_difference(
        table(np.repeat(noise, seeds, axis=0) + shift), table(noise, "base", update=0), "x", resamples=100
    )
    assert interval.estimate == pytest.approx(shift, abs=1e-12)
    assert (interval.low, interval.high) == pytest.approx((shift, shift), abs=1e-12)
    assert interval.unit == ("seeds" if seeds >= 5 else "prompts")
    assert ("conditional on these seeds" in interval.note) == (seeds < 5)


def test_pairs_are_found_by_key_and_not_by_order() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = table(rng.normal(size=(2, 8, 2))), table(rng.normal(size=(2, 8, 2)), "grpo")
    expected = paired_difference(ours, theirs, "x")
    shuffled = paired_difference(ours.sample(frac=1, random_state=3), theirs.sample(frac=1, random_state=4), "x")
    assert shuffled == expected
    assert expected.estimate == pytest.approx(ours["x"].mean() - theirs["x"].mean())
    assert paired_difference(ours, theirs, "x", seed=1).low != expected.low


def test_pairing_removes_the_variance_that_prompts_share() -> None:
    rng = np.random.default_rng(2)
    prompts = rng.normal(0, 10, size=(1, 30, 1))
    interval = paired_difference(
        table(prompts + 1 + rng.normal(0, 0.1, prompts.shape)), table(prompts, "base", update=0), "x"
    )
    assert 0.8 < interval.low < 1 < interval.high < 1.2


def test_the_interval_is_scipys_percentile_bootstrap_at_the_expanded_level() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=(1, 25, 1))
    ours = paired_difference(table(values), base(25), "x", resamples=20000)
    level = 1 - 2 * tail_probability(0.95, 25)
    theirs = stats.bootstrap(
        (values.ravel(),), np.mean, n_resamples=20000, confidence_level=level, method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval  # fmt: skip
    spread = values.std() / 5
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * spread)
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * spread)


def test_the_expanded_level_is_students_interval_for_normal_data() -> None:
    # A bootstrap mean is normal with variance (n - 1) / n of the unbiased one; the widened quantile undoes it.
    for units in (3, 5, 40):
        width = -stats.norm.ppf(tail_probability(0.9, units)) * np.sqrt((units - 1) / units)
        assert width == pytest.approx(-stats.t.ppf(0.05, units - 1))
    with pytest.raises(ValueError, match=r"confidence 1 must lie in \(0, 1\)"):
        tail_probability(1, 5)


@pytest.mark.parametrize(
    ("seeds", "prompts", "seed_spread", "unit"),
    [(1, 12, 0.0, "prompts"), (5, 12, 1.0, "seeds"), (8, 12, 0.3, "seeds")],
)
def test_intervals_cover_the_truth_about_as_often_as_they_say(
    seeds: int, prompts: int, seed_spread: float, unit: str
) -> None:
    rng, trials, hits = np.random.default_rng(5), 150, 0
    for trial in range(trials):
        values = (
            1.0
            + seed_spread * rng.normal(size=(seeds, 1, 1))
            + 0.5 * rng.normal(size=(1, prompts, 1))
            + 0.5 * rng.normal(size=(seeds, prompts, 1))
        )
        interval = paired_difference(table(values), base(prompts), "x", resamples=400, seed=trial)
        assert interval.unit == unit
        hits += interval.low <= 1.0 <= interval.high
    # Three standard errors of a share of 0.95 in 150 trials are 0.053.
    assert hits / trials > 0.89


def test_seeds_count_on_the_side_that_has_fewer_but_an_untrained_side_has_none() -> None:
    rng = np.random.default_rng(6)
    five, two = table(rng.normal(size=(5, 6, 1))), table(rng.normal(size=(2, 6, 1)), "grpo")
    assert paired_difference(five, base(6), "x").unit == "seeds"
    assert paired_difference(five, two, "x").unit == "prompts"
    assert paired_difference(two, five, "x").note == "conditional on these seeds"
    assert paired_difference(five, five.assign(arm="grpo"), "x").note == "over 5 seeds and 6 prompts"


def test_arms_with_the_same_seeds_are_paired_by_seed() -> None:
    rng = np.random.default_rng(7)
    shared = 5 * rng.normal(size=(6, 1, 1)) + rng.normal(size=(6, 10, 1))
    ours, theirs = table(shared + 1), table(shared, "grpo")
    paired = paired_difference(ours, theirs, "x")
    other_seeds = paired_difference(ours, theirs.assign(seed=theirs["seed"] + 100), "x")
    assert paired.high - paired.low < 1e-9
    assert other_seeds.high - other_seeds.low > 2


def test_missing_doubled_and_broken_rows_are_named() -> None:
    ours, theirs = table(np.zeros((2, 3, 2))), table(np.zeros((1, 3, 2)), "grpo")
    with pytest.raises(ScoresError, match=r"scores of grpo: no row for \(prompt_id p001, sample 1\), so vipo and grpo"):
        paired_difference(ours, theirs[(theirs["prompt_id"] != "p001") | (theirs["sample"] != 1)], "x")
    with pytest.raises(ScoresError, match=r"scores of vipo: no row for \(prompt_id p002, sample 0\)"):
        paired_difference(ours[(ours["prompt_id"] != "p002") | (ours["sample"] != 0)], theirs, "x")
    with pytest.raises(ScoresError, match=r"no row for \(seed 1, prompt_id p002, sample 1\), which other seeds have"):
        paired_difference(ours.iloc[:-1], theirs, "x")
    with pytest.raises(ScoresError, match=r"several rows for .*and 19 more; select one update"):
        paired_difference(pd.concat([ours, ours.assign(update=20)]), theirs, "x")
    with pytest.raises(ScoresError, match=r"x is infinite for \(seed 0, prompt_id p000, sample 1\)"):
        paired_difference(ours.assign(x=np.where(ours.index == 1, np.inf, 0)), theirs, "x")
    with pytest.raises(ScoresError, match=r"no column 'y'"):
        paired_difference(ours, theirs, "y")
    with pytest.raises(ScoresError, match="evaluate at least 2 prompts"):
        paired_difference(table(np.zeros((1, 1, 2))), base(1, 2), "x")


def test_compare_arms_pairs_updates_with_updates_and_final_with_final() -> None:
    parts = [base(4)]
    for arm, gain, last in (("grpo", 1.0, 20), ("vipo", 3.0, 30)):
        for update in (10, last):
            values = np.full((2, 4, 1), gain * update)
            parts.append(table(values, arm, update, final=update == last))
    result = compare_arms(pd.concat(parts), ["x"], resamples=100)
    found = {(row.arm, row.update, row.reference): row.difference for row in result.itertuples()}
    assert found == pytest.approx(
        {
            ("grpo", 10, "base"): 10, ("grpo", 20, "base"): 20, ("vipo", 10, "base"): 30, ("vipo", 10, "grpo"): 20,
            ("vipo", 30, "base"): 90, ("vipo", 30, "grpo"): 70,
        }
    )  # fmt: skip
    assert list(result.columns) == [
        "arm", "update", "final", "column", "seeds", "mean", "reference", "difference", "low", "high", "unit", "note",
    ]  # fmt: skip
    assert set(result["seeds"]) == {2}
    assert (
        compare_arms(pd.concat(parts), ["x"], references=["base", "absent"], resamples=100)["reference"]
        .eq("base")
        .all()
    )


def test_means_weigh_every_prompt_alike() -> None:
    rows = table(np.array([[[0.0], [0.0], [6.0]]]))
    assert mean_score(rows, "x") == 2.0


def curve_scores() -> pd.DataFrame:
    """Reward 0 at the base; `fast` reaches 4, `slow` 2, `flat` nothing; the side effect grows as the reward squared."""
    parts = [base(3)]
    for arm, rewards in {"fast": (2.0, 4.0), "slow": (1.0, 2.0), "flat": (-1.0, 0.0)}.items():
        for update, reward in zip((10, 20), rewards, strict=True):
            for seed, offset in enumerate((-0.5, 0.5) if arm == "slow" else (0.0,)):
                rows = table(np.full((1, 3, 1), reward + offset), arm, update, final=update == 20)
                parts.append(rows.assign(seed=seed))
    scores = pd.concat(parts, ignore_index=True)
    return scores.assign(side=scores["x"] ** 2)


def test_matching_interpolates_at_the_first_crossing_and_says_not_reached() -> None:
    result = matched_reward(curve_scores(), "x", ["side"])
    arms = result[result["seed"].isna()].set_index("arm")
    # The lower median of the best values 4 (fast) and 2 (slow); flat never rose above the base.
    assert set(result["level"]) == {2.0}
    assert arms["reached"].to_dict() == {"fast": True, "slow": True, "flat": False}
    assert arms["update"].to_dict() == pytest.approx({"fast": 10, "slow": 20, "flat": np.nan}, nan_ok=True)
    assert arms.at["slow", "side"] == pytest.approx((1.5**2 + 2.5**2) / 2)
    seeds = result[(result["arm"] == "slow") & result["seed"].notna()].set_index("seed")
    assert seeds["reached"].to_dict() == {0: False, 1: True}
    # Seed 1 goes from 1.5 at update 10 to 2.5 at update 20: level 2 is half way.
    assert seeds.at[1, "update"] == pytest.approx(15)
    assert seeds.at[1, "side"] == pytest.approx((1.5**2 + 2.5**2) / 2)


def test_matching_downwards_and_without_any_movement() -> None:
    scores = curve_scores()
    mirrored = matched_reward(scores.assign(x=-scores["x"]), "x", ["side"], better="lower")
    pd.testing.assert_frame_equal(
        mirrored.drop(columns="level"), matched_reward(scores, "x", ["side"]).drop(columns="level")
    )
    still = matched_reward(scores[scores["arm"].isin(["base", "flat"])], "x", ["side"])
    assert still["level"].isna().all()
    assert not still["reached"].any()


def test_curves_start_at_the_base() -> None:
    curves = evaluation_curves(curve_scores(), ["x"], per_seed=True)
    slow = curves[(curves["arm"] == "slow") & (curves["seed"] == 1)]
    assert list(slow["update"]) == [0, 10, 20]
    assert list(slow["x"]) == [0, 1.5, 2.5]
    with pytest.raises(ScoresError, match="untrained base"):
        evaluation_curves(curve_scores().query("update > 0"), ["x"])


@given(low=st.floats(-10, 10), width=st.floats(0, 5), share=st.floats(0, 1))
def test_wording_never_claims_a_difference_that_the_interval_does_not_carry(
    low: float, width: float, share: float
) -> None:
    interval = Interval(low + share * width, low, low + width, "prompts", "")
    words = wording(interval, "higher")
    assert (words == "no difference shown") == (low <= 0 <= low + width)
    if words != "no difference shown":
        assert words.startswith("better by" if low > 0 else "worse by")
        assert wording(interval, "lower").startswith("worse by" if low > 0 else "better by")
        assert wording(interval, None).startswith("higher by" if low > 0 else "lower by")


def test_numbers_show_three_significant_digits() -> None:
    assert [decimals(value) for value in (0.0, 0.12, -1.5, 22.7, 480.0, 0.00123, 1e-12)] == [3, 3, 2, 1, 0, 5, 6]
    assert wording(Interval(0.1234, 0.01, 0.2, "prompts", "")) == "better by 0.123"


@given(seeds=st.integers(1, 3), prompts=st.integers(2, 9), others=st.integers(2, 9), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_independent_difference_is_welchs_interval(seeds: int, prompts: int, others: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = rng.normal(1, 2, (seeds, prompts, 2)), rng.normal(0, 1, (1, others, 3))
    interval = independent_difference(table(ours), table(theirs, "grpo"), "x", confidence=0.9)
    means = ours.mean(axis=(0, 2)), theirs.mean(axis=(0, 2))
    parts = [values.var(ddof=1) / len(values) for values in means]
    freedom = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, means, strict=True))
    half = stats.t.ppf(0.95, freedom) * np.sqrt(sum(parts))
    estimate = means[0].mean() - means[1].mean()
    assert interval.estimate == pytest.approx(estimate)
    assert (interval.low, interval.high) == pytest.approx((estimate - half, estimate + half))
    assert "not paired" in interval.note


def test_independent_difference_of_constants_and_of_one_prompt() -> None:
    interval = independent_difference(base(3, value=1.0), base(4, value=0.25), "x")
    assert (interval.low, interval.estimate, interval.high) == (0.75, 0.75, 0.75)
    with pytest.raises(ScoresError, match="at least 2 prompts"):
        independent_difference(base(1), base(4), "x")
