"""A sample without a score is left out of that metric in every run, and the numbers are those of rows without it."""

import numpy as np
import pandas as pd
import pytest

from vipo.evaluation.comparison import by_category, over_metrics, win_rates
from vipo.evaluation.left_out import left_out, on_common_samples, told
from vipo.evaluation.matched import evaluation_curves, matched_reward
from vipo.evaluation.means import ScoresError, mean_scores
from vipo.evaluation.statistics import compare_arms
from vipo.evaluation.summary import summarize
from vipo.evaluation.totals import set_totals
from vipo.reporting.verdict import EqualChange, equal_change

JUDGE, CHANGE = "reward/judge", "change/total"
COLUMNS = ["reward/a", JUDGE, CHANGE]
PROMPTS, SAMPLES = 8, 2


def _scores(seeds: int = 2) -> pd.DataFrame:
    rng, rows = np.random.default_rng(0), []
    runs = [("base", 0, (0,)), *((arm, seed, (2, 4)) for arm in ("grpo", "vipo") for seed in range(seeds))]
    for arm, seed, updates in runs:
        for update in updates:
            for prompt in range(PROMPTS):
                for sample in range(SAMPLES):
                    row = {"run": f"{arm}-s{seed}", "arm": arm, "seed": seed, "update": update, "prompt": "p"}
                    row |= {"final": update in (0, 4), "prompt_id": f"p{prompt}", "sample": sample}
                    gain = update * (2 if arm == "vipo" else 1)
                    values = rng.normal([gain, gain + prompt, 0], 0.1)
                    rows.append({**row, **dict(zip(COLUMNS, [*values[:2], 0.01 * update], strict=True))})
    return pd.DataFrame(rows)


def _without(scores: pd.DataFrame, lacks: list[tuple[str, int, str, int]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores where runs lack the judge's score of a sample; and those without the samples."""
    lacking, keys = scores.copy(), pd.Series(False, index=scores.index)
    for run, update, prompt, sample in lacks:
        pair = (scores["prompt_id"] == prompt) & (scores["sample"] == sample)
        lacking.loc[pair & (scores["run"] == run) & (scores["update"] == update), JUDGE] = np.nan
        keys |= pair
    return lacking, scores[~keys]


LACKS = [("vipo-s1", 4, "p0", 1), ("base-s0", 0, "p5", 0), ("grpo-s0", 2, "p7", 0), ("grpo-s1", 4, "p7", 0)]


def test_every_number_is_that_of_the_samples_that_all_runs_have() -> None:
    scores = _scores()
    lacking, fewer = _without(scores, LACKS)
    common, lost = on_common_samples(lacking)
    assert lost == ()
    assert left_out(common, JUDGE) == 3
    # A metric that lacks nothing keeps every sample and every digit.
    for column, wanted in ((JUDGE, fewer), ("reward/a", scores)):
        for table in (
            lambda rows, name=column: evaluation_curves(rows, [name]),
            lambda rows, name=column: evaluation_curves(rows, [name], per_seed=True),
            lambda rows, name=column: matched_reward(rows, CHANGE, [name]),
            lambda rows, name=column: compare_arms(rows, [name], resamples=50).drop(columns="note"),
            lambda rows, name=column: win_rates(rows, [name]).drop(columns="note"),
            lambda rows, name=column: over_metrics(rows, [name], resamples=50).drop(columns="note"),
            lambda rows, name=column: pd.DataFrame([mean_scores(rows[rows["arm"] == "vipo"].query("final"), [name])]),
        ):
            pd.testing.assert_frame_equal(table(common), table(wanted), rtol=1e-12)
    ours, theirs = map(_at_equal_change, (common, fewer))
    assert ours.gain.estimate == pytest.approx(theirs.gain.estimate)
    assert ours.level == pytest.approx(theirs.level)


def test_prompts_that_are_left_out_whole_leave_the_other_metrics_alone() -> None:
    scores = _scores()
    lacking, _ = _without(scores, [("vipo-s0", 4, "p3", 0), ("vipo-s0", 4, "p3", 1)])
    common, _ = on_common_samples(lacking)
    fewer = scores[scores["prompt_id"] != "p3"]
    both = over_metrics(common, COLUMNS, resamples=2000).set_index(["arm", "column"])
    alone = over_metrics(fewer, [JUDGE], resamples=2000).set_index(["arm", "column"])
    whole = over_metrics(scores, COLUMNS, resamples=2000).set_index(["arm", "column"])
    assert both.loc[("vipo", JUDGE), "difference"] == pytest.approx(alone.loc[("vipo", JUDGE), "difference"])
    assert both.loc[("vipo", "reward/a"), "difference"] == whole.loc[("vipo", "reward/a"), "difference"]
    assert both.loc[("vipo", JUDGE), "note"].startswith(f"{PROMPTS - 1} prompts")
    assert both.loc[("vipo", "reward/a"), "note"].startswith(f"{PROMPTS} prompts")
    ours, theirs, unmasked = map(_at_equal_change, (common, fewer, scores))
    assert ours.gain.estimate == pytest.approx(theirs.gain.estimate)
    assert ours.gain.low == pytest.approx(theirs.gain.low, abs=0.05)
    assert ours.effects == unmasked.effects


def _at_equal_change(scores: pd.DataFrame) -> EqualChange:
    found = equal_change(
        scores, "vipo", "grpo", JUDGE, ["reward/a"], better="higher", resamples=400, confidence=0.9, seed=0
    )
    assert found is not None
    return found


def test_what_is_left_out_is_told_beside_every_mean() -> None:
    scores = _scores()
    lacking, _ = _without(scores, LACKS)
    common, _ = on_common_samples(lacking)
    text = "3 of 16 samples have no score and are left out"
    assert told(common, JUDGE) == text
    assert told(common, "reward/a") == ""
    compared = compare_arms(common, COLUMNS, resamples=50)
    assert set(compared[compared["column"] == JUDGE]["note"]) == {f"conditional on these seeds; {text}"}
    assert not compared[compared["column"] != JUDGE]["note"].str.contains("left out").any()
    for table in (win_rates(common, COLUMNS), over_metrics(common, COLUMNS, resamples=50)):
        telling = table["note"].str.contains(text)
        assert (telling == (table["column"] == JUDGE)).all()
    categories = by_category(
        common, {f"p{n}": "odd" if n % 2 else "p0" for n in range(PROMPTS) if n in (0, 1)}, COLUMNS
    )
    assert set(categories["note"]) == {"", f"{JUDGE}: 1 of 2 samples have no score and are left out"}


def test_a_run_tells_its_own_and_keeps_the_rest() -> None:
    scores = _scores()
    own = _without(scores, LACKS)[0].query("run == 'vipo-s1'")
    told_of = summarize(own)
    assert told_of["left_out"] == {JUDGE: 1}
    assert told_of[JUDGE] == pytest.approx(own[own["final"]][JUDGE].mean())
    assert "left_out" not in summarize(scores.query("run == 'vipo-s1'"))
    assert summarize(own.assign(**{JUDGE: np.nan}))[JUDGE] is None


def test_a_metric_that_nothing_is_left_of_is_no_column() -> None:
    scores = _scores()
    scores.loc[(scores["run"] == "grpo-s0") & (scores["prompt_id"] != "p1"), JUDGE] = np.nan
    common, lost = on_common_samples(scores)
    assert lost == (JUDGE,)
    assert JUDGE not in common
    assert on_common_samples(_scores())[0].equals(_scores())


def test_sides_that_lack_other_samples_are_not_compared_unawares() -> None:
    lacking, _ = _without(_scores(), LACKS)
    with pytest.raises(ScoresError, match="cannot be paired"):
        compare_arms(lacking, [JUDGE], resamples=50)


def test_genevals_total_takes_no_missing_score_for_wrong() -> None:
    rows = [("00", 1.0), ("01", np.nan), ("02", 1.0), ("03", 0.0)]
    metadata = {prompt: {"tag": "counting" if prompt < "02" else "colors"} for prompt, _ in rows}
    frame = pd.DataFrame({"arm": "base", "final": True, "prompt_id": [p for p, _ in rows], "sample": 0})
    frame["reward/geneval"] = [value for _, value in rows]
    found = set_totals(frame, metadata).set_index("total").loc["geneval"]
    assert found["value"] == pytest.approx((1 + 0.5) / 2)
    assert "1 of 4 samples have no score and are left out" in found["note"]
    frame.loc[:1, "reward/geneval"] = np.nan
    found = set_totals(frame, metadata).set_index("total").loc["geneval"]
    assert (found["value"], found["note"]) == (None, "not measured: no sample of counting has a score")
