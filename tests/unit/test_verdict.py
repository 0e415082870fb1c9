"""The page's first sentence: two arms at equal change of the picture, against explicit loops."""

import numpy as np
import pandas as pd
import pytest

from vipo.reporting.sections.result import _percent
from vipo.reporting.verdict import equal_change

UPDATES, PROMPTS, SAMPLES = (5, 10, 20), 12, 2


def scores(gains: dict[str, tuple[float, float, float]], seeds: int = 2, noise: float = 0.0) -> pd.DataFrame:
    """`gains`: of each arm the reward's, the side effect's and the change's slope over updates."""
    rng = np.random.default_rng(3)
    rows = []
    for arm, slopes in {"base": (0.0, 0.0, 0.0), **gains}.items():
        for seed in range(1 if arm == "base" else seeds):
            for update in (0,) if arm == "base" else UPDATES:
                for prompt in range(PROMPTS):
                    for sample in range(SAMPLES):
                        start = 0.1 * prompt + 0.01 * sample
                        reward, side, change = (slope * update for slope in slopes)
                        drawn = noise * rng.normal(size=2) if update else np.zeros(2)
                        rows.append(
                            {
                                "arm": arm, "seed": seed, "update": update, "final": update == max(UPDATES),
                                "prompt_id": f"{prompt:02}", "sample": sample,
                                "reward/a": start + reward + drawn[0], "reward/b": 1 - start + side + drawn[1],
                                "change/total": change,
                            }
                        )  # fmt: skip
    return pd.DataFrame(rows)


def compared(table: pd.DataFrame, **changes: object):
    options = {"better": "higher", "resamples": 200, "confidence": 0.95, "seed": 0, **changes}
    return equal_change(table, "vipo", "grpo", "reward/a", ["reward/b"], **options)


def test_both_arms_are_read_where_the_slower_one_got_to() -> None:
    # grpo changes .2 by update 20; vipo twice as fast, so that it is read at update 10.
    found = compared(scores({"grpo": (0.010, -0.005, 0.010), "vipo": (0.025, -0.002, 0.020)}))
    assert found.level == pytest.approx(0.2)
    assert found.updates == pytest.approx((10, 20))
    assert found.gain.estimate == pytest.approx(0.25)
    assert found.reference_gain.estimate == pytest.approx(0.20)
    assert found.share.estimate == pytest.approx(1.25)
    assert found.difference.estimate == pytest.approx(0.05)
    (effect,) = found.effects
    assert [span.estimate for span in (effect.arm, effect.reference, effect.between)] == pytest.approx(
        [-0.02, -0.10, 0.08]
    )
    assert found.word == "better"
    assert (found.seeds, found.over_seeds, found.prompts) == ((2, 2), False, PROMPTS)


def test_between_evaluated_updates_the_curve_is_a_line() -> None:
    found = compared(scores({"grpo": (0.010, 0, 0.006), "vipo": (0.010, 0, 0.008)}))
    assert found.level == pytest.approx(0.12)
    assert found.updates == pytest.approx((15, 20))
    assert found.share.estimate == pytest.approx(0.75)
    assert found.word == "worse"


def test_a_reward_that_is_to_fall_gains_by_falling() -> None:
    found = compared(scores({"grpo": (-0.01, 0, 0.01), "vipo": (-0.02, 0, 0.01)}), better="lower")
    assert found.gain.estimate == pytest.approx(0.4)
    assert found.share.estimate == pytest.approx(2)
    assert found.word == "better"


def test_an_interval_that_holds_equality_says_not_shown() -> None:
    found = compared(scores({"grpo": (0.010, 0, 0.01), "vipo": (0.0101, 0, 0.01)}, noise=0.1))
    assert found.share.low < 1 < found.share.high
    assert found.word == "not shown"


def test_no_share_is_given_of_a_gain_that_is_not_shown() -> None:
    found = compared(scores({"grpo": (0.0, 0, 0.01), "vipo": (0.02, 0, 0.01)}, noise=0.1))
    assert found.share is None
    assert found.difference.low > 0
    assert found.word == "better"


def test_the_interval_is_that_of_an_explicit_bootstrap() -> None:
    table = scores({"grpo": (0.010, -0.005, 0.010), "vipo": (0.012, -0.002, 0.010)}, noise=0.05)
    found = compared(table, resamples=4000)
    # At equal change throughout, both arms are read at the last update.
    last = table[table["final"] & (table["update"] > 0)].groupby(["arm", "prompt_id"])["reward/a"].mean()
    base = table[table["arm"] == "base"].groupby("prompt_id")["reward/a"].mean()
    ours, theirs = (last[arm].to_numpy() - base.to_numpy() for arm in ("vipo", "grpo"))
    rng = np.random.default_rng(11)
    draws = []
    for _ in range(4000):
        chosen = rng.integers(0, PROMPTS, PROMPTS)
        draws.append(ours[chosen].mean() / theirs[chosen].mean())
    width = found.share.high - found.share.low
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.share.estimate == pytest.approx(ours.mean() / theirs.mean())
    # Hesterberg's percentiles are a little wider than plain ones with 12 prompts.
    assert low - 0.25 * width < found.share.low < low + 0.02
    assert high - 0.02 < found.share.high < high + 0.25 * width


def test_five_seeds_are_resampled_too() -> None:
    found = compared(scores({"grpo": (0.01, 0, 0.01), "vipo": (0.02, 0, 0.01)}, seeds=5, noise=0.05))
    assert found.over_seeds


def test_what_cannot_be_compared_is_none() -> None:
    table = scores({"grpo": (0.01, 0, 0.0), "vipo": (0.01, 0, 0.0)})
    assert compared(table) is None
    assert compared(table[table["arm"] != "vipo"]) is None
    unequal = scores({"grpo": (0.01, 0, 0.01), "vipo": (0.01, 0, 0.01)})
    assert compared(unequal[~((unequal["seed"] == 1) & (unequal["update"] == 10))]) is None


def test_shares_have_a_minus_sign_and_no_negative_zero() -> None:
    assert [_percent(share) for share in (-0.012, -0.004, 0.0, 1.136)] == ["−1", "0", "0", "114"]
