"""Registered measures against explicit integration and SciPy; the page on a made-up credit2."""

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from vipo.cli import app
from vipo.config.compose import load_config
from vipo.config.registered import RegisteredConfig
from vipo.config.run import Config
from vipo.config.validation import ConfigError
from vipo.evaluation.means import ScoresError
from vipo.evaluation.registered import (
    EQUAL_CHANGE,
    EQUAL_UPDATES,
    analyse,
    area_over_change,
    area_over_updates,
)
from vipo.reporting.inputs import ReportError
from vipo.reporting.registered import write_registered

UPDATES = (3, 6, 9, 12)
REWARD, CHANGE, SHAPE = "reward/object_redness", "change/total", "reward/scene_shape"
OTHERS = ("reward/redness", "reward/scene", "reward/scene_background")


def _first_crossings(changes: list[float], rewards: list[float], level: float) -> float:
    """Mean reward over a fine grid of levels, each searched along the finely walked curve; less the first reward."""
    walked = np.linspace(0, len(changes) - 1, 200_001)
    change, reward = (np.interp(walked, np.arange(len(changes)), values) for values in (changes, rewards))
    grid = (np.arange(20_000) + 0.5) / 20_000 * level
    at = np.searchsorted(np.maximum.accumulate(change), grid)
    return float(reward[at].mean() - rewards[0])


def test_area_over_updates_is_the_trapezoids() -> None:
    # Of 0, 3, 6 and 4 at 0, 1, 2 and 4: 1.5 + 4.5 + 10 = 16 over 4 updates.
    assert area_over_updates([0, 1, 2, 4], [0, 3, 6, 4]) == pytest.approx(4)
    assert area_over_updates([0, 1, 2, 4], [1, 4, 7, 5]) == pytest.approx(4), "the base's reward is taken off"
    assert area_over_updates([0, 3, 12], [0.5, 0.5, 0.5]) == 0


@pytest.mark.parametrize(
    ("changes", "rewards", "level"),
    [
        ([0, 1, 2, 4], [0.1, 0.4, 0.3, 0.9], 4),
        ([0, 1, 2, 4], [0.1, 0.4, 0.3, 0.9], 2.7),
        ([0, 1, 2, 4], [0.1, 0.4, 0.3, 0.9], 0.4),
        # The pictures go back toward the base before they change on.
        ([0, 3, 1, 4, 4.5], [0.1, 0.5, 0.2, 0.9, 0.7], 4.2),
        ([0, 3, 1, 2, 2.5], [0.1, 0.5, 0.2, 0.9, 0.7], 3),
    ],
)
def test_area_over_change_reads_each_level_where_it_is_first_reached(
    changes: list[float], rewards: list[float], level: float
) -> None:
    expected = _first_crossings(changes, rewards, level)
    assert area_over_change(changes, rewards, level) == pytest.approx(expected, abs=2e-4)


def test_area_over_change_of_a_line_is_its_middle() -> None:
    assert area_over_change([0, 1, 2], [0.2, 0.4, 0.6], 1.5) == pytest.approx(0.15)
    for level in (0, -1, 2.1):
        with pytest.raises(ValueError, match="is not above 0 and at most 2"):
            area_over_change([0, 1, 2], [0, 1, 2], level)


def _run(arm: str, seed: int, rewards: list[float], changes: list[float], shape: float = 0.0) -> pd.DataFrame:
    """A run's rows at `UPDATES` (the base: at 0): two held-out prompts around the means."""
    updates = (0,) if arm == "base" else UPDATES
    rows = []
    for update, reward, change in zip(updates, rewards, changes, strict=True):
        for prompt, shift in (("a", 0.01), ("b", -0.01)):
            row = {"run": f"{arm}-s{seed}", "arm": arm, "seed": seed, "update": update, "final": update in (0, 12)}
            row |= {"prompt_id": prompt, "prompt": prompt, "sample": 0, REWARD: reward + shift}
            row |= {CHANGE: change, SHAPE: 0.9 + shape * update, **dict.fromkeys(OTHERS, 0.5)}
            rows.append(row)
    return pd.DataFrame(rows)


def _experiment(
    gains: dict[str, float], seeds: list[int], *, spread: float, fast: tuple[str, ...] = ()
) -> list[pd.DataFrame]:
    """Runs whose reward gains `gains` an update more or less; `fast` arms change pictures as much more as they gain."""
    rng = np.random.default_rng(3)
    runs = [_run("base", 0, [0.1], [0.0])]
    for arm, gain in gains.items():
        for seed in seeds:
            noise = rng.normal(0, spread, 4)
            rewards = [0.1 + gain * update + off for update, off in zip(UPDATES, noise, strict=True)]
            pace = gain / gains["grpo"] if arm in fast else 1.0
            runs.append(_run(arm, seed, rewards, [0.01 * pace * update for update in UPDATES], -0.01 * gain))
    return runs


RULE = RegisteredConfig(
    reward=REWARD,
    families={"candidates": {"better": "grpo", "faster": "grpo"}},
    controls={"control": "grpo"},
    side_effects=(SHAPE,),
)


def test_tests_are_scipys_and_the_rule_needs_both_measures() -> None:
    seeds = list(range(8))
    gains = {"grpo": 0.02, "better": 0.03, "faster": 0.03, "control": 0.02}
    scores = pd.concat(_experiment(gains, seeds, spread=0.01, fast=("faster",)), ignore_index=True)
    found = analyse(scores, RULE, 0.95)
    assert found.controls == ()
    assert set(found.learned) == set(gains)
    # What is only faster is ahead at equal updates and not at equal change.
    assert (found.families["candidates"].passed, found.families["candidates"].leads) == (("better",), "better")
    tests = found.tests.set_index(["arm", "measure"])
    assert tests.loc[("faster", EQUAL_UPDATES), "holm"] < 0.05
    assert abs(tests.loc[("faster", EQUAL_CHANGE), "difference"]) < 0.02
    assert np.isnan(tests.loc[("control", EQUAL_UPDATES), "holm"])

    def mean(arm: str, seed: int, update: int, column: str) -> float:
        rows = scores[(scores["arm"] == arm) & (scores["update"] == update) & (scores["seed"] == seed)]
        return sum(rows[column]) / len(rows)

    def curve(arm: str, seed: int, column: str) -> list[float]:
        return [mean("base", 0, 0, column), *(mean(arm, seed, update, column) for update in UPDATES)]

    for arm in ("better", "faster", "control"):
        differences: dict[str, list[float]] = {EQUAL_UPDATES: [], EQUAL_CHANGE: []}
        for seed in seeds:
            ours, theirs = ((curve(own, seed, REWARD), curve(own, seed, CHANGE)) for own in (arm, "grpo"))
            level = min(max(ours[1]), max(theirs[1]))
            updates = [
                sum(3 * (left + right) / 2 for left, right in itertools.pairwise(own[0])) / 12 for own in (ours, theirs)
            ]
            differences[EQUAL_UPDATES].append(updates[0] - updates[1])
            first, second = (_first_crossings(own[1], own[0], level) for own in (ours, theirs))
            differences[EQUAL_CHANGE].append(first - second)
        for measure, values in differences.items():
            row = tests.loc[(arm, measure)]
            test = stats.ttest_1samp(values, 0)
            limits = test.confidence_interval(0.95)
            assert row["difference"] == pytest.approx(np.mean(values), abs=1e-4)
            assert (row["low"], row["high"]) == pytest.approx((limits.low, limits.high), abs=3e-4)
            assert row["p"] == pytest.approx(test.pvalue, rel=0.05)
    for measure in (EQUAL_UPDATES, EQUAL_CHANGE):
        one, two = tests.loc[("better", measure), "p"], tests.loc[("faster", measure), "p"]
        adjusted = min(1, 2 * min(one, two)), max(min(1, 2 * min(one, two)), max(one, two))
        assert sorted(tests.loc[(["better", "faster"], measure), "holm"]) == pytest.approx(adjusted)
    # At equal change the shape is read where both runs got to: the slower one's end.
    half = found.runs.set_index(["arm", "seed", "measure"]).loc[("faster", 0, f"{SHAPE} at equal change")]
    assert half["common_change"] == pytest.approx(0.12)
    assert (half["value"], half["reference_value"]) == pytest.approx((0.9 - 0.01 * 0.03 * 8, 0.9 - 0.01 * 0.02 * 12))


def test_a_control_that_passes_lets_nobody_pass() -> None:
    gains = {"grpo": 0.02, "better": 0.03, "faster": 0.02, "control": 0.03}
    scores = pd.concat(_experiment(gains, list(range(8)), spread=0.003), ignore_index=True)
    found = analyse(scores, RULE, 0.95)
    assert found.controls == ("control",)
    assert (found.families["candidates"].passed, found.families["candidates"].leads) == ((), None)
    # A pair of two families is measured once.
    twice = RULE.model_copy(update={"families": {**RULE.families, "again": {"better": "grpo"}}, "controls": {}})
    tests = analyse(scores, twice, 0.95).tests.set_index(["role", "arm", "measure"])
    for measure in (EQUAL_UPDATES, EQUAL_CHANGE):
        for key in ("seeds", "low", "p"):
            assert tests.loc[("again", "better", measure), key] == tests.loc[("candidates", "better", measure), key]
        assert tests.loc[("again", "better", measure), "seeds"] == 8
    # As much below is no pass, whatever the p.
    gains["control"], gains["better"] = 0.01, 0.005
    found = analyse(pd.concat(_experiment(gains, list(range(8)), spread=0.003), ignore_index=True), RULE, 0.95)
    assert (found.controls, found.families["candidates"].passed) == ((), ())


def test_arms_whose_reward_rose_are_told(tmp_path: Path, credit2: Config) -> None:
    gains = {"grpo": -0.02, "better": 0.01, "faster": -0.01, "control": -0.02}
    found = analyse(pd.concat(_experiment(gains, [0, 1, 2], spread=0.0), ignore_index=True), RULE, 0.95)
    assert found.learned == ("better",)
    _write(tmp_path / "results", credit2, {arm: -0.02 for arm in credit2.experiment.arms if arm != "base"})
    write_registered(credit2, tmp_path / "results", tmp_path / "out")
    assert json.loads((tmp_path / "out/credit2.json").read_text())["learned"] == []
    assert "**Nothing was learned**" in (tmp_path / "out/credit2.md").read_text()


def test_runs_that_cannot_be_compared_are_named() -> None:
    runs = _experiment({"grpo": 0.02, "better": 0.03, "faster": 0.03, "control": 0.02}, [0, 1], spread=0.0)
    for broken, message in (
        (runs[2][runs[2]["update"] != 6], r"grpo-s1 was evaluated at updates \[3, 9, 12\], better-s0"),
        (runs[2][(runs[2]["update"] != 6) | (runs[2]["prompt_id"] == "a")], "grpo-s1 at update 6 has other prompts"),
        (runs[2].assign(**{CHANGE: 0.0}), "grpo of seed 1 never changed a picture"),
        (runs[2].drop(columns=SHAPE), f"grpo: no sample has a score of {SHAPE} for every seed"),
    ):
        with pytest.raises(ScoresError, match=message):
            analyse(pd.concat([*runs[:2], broken, *runs[3:]], ignore_index=True), RULE, 0.95)
    with pytest.raises(ScoresError, match="no score column reward/other"):
        analyse(pd.concat(runs), RULE.model_copy(update={"reward": "reward/other"}), 0.95)


@pytest.fixture(scope="module")
def credit2() -> Config:
    """As registered, but with four of its seeds."""
    arms = load_config(["experiment=credit2", "arm=base"]).experiment.arms
    fewer = [f"experiment.arms.{arm}.seeds=[100,101,102,103]" for arm in arms if arm != "base"]
    return load_config(["experiment=credit2", "arm=base", *fewer])


def _write(results: Path, config: Config, gains: dict[str, float]) -> Path:
    """Folders as the stages leave them, without any configuration: what is read may be an older vipo's."""
    folder = results / config.experiment.name
    for table in _experiment(gains, list(config.experiment.arms["grpo"].seeds), spread=0.01):
        run = table["run"].iloc[0]
        (folder / "evaluation" / run).mkdir(parents=True)
        table.to_parquet(folder / "evaluation" / run / "scores.parquet", index=False)
        if not run.startswith("base-"):
            (folder / "runs" / run).mkdir(parents=True)
            (folder / "runs" / run / "provenance.json").write_text('{"git": {"commit": "abc123", "dirty": false}}')
    return folder


def test_the_page_of_a_made_up_credit2(tmp_path: Path, credit2: Config) -> None:
    arms = {arm: 0.02 for arm in credit2.experiment.arms if arm != "base"} | {"contrast": 0.04, "product": 0.05}
    folder = _write(tmp_path / "results", credit2, arms)
    output = tmp_path / "out"
    written = {path.name: path.read_bytes() for path in write_registered(credit2, tmp_path / "results", output)}
    assert {path.name for path in output.iterdir()} == set(written)
    assert sorted(written) == ["credit2.csv", "credit2.json", "credit2.md", "credit2.svg"]
    facts = json.loads(written["credit2.json"])
    assert facts["families"]["candidates"] == {"passed": ["contrast", "product"], "leads": "product"}
    assert (facts["commits"], facts["updates"], facts["held_out_samples"]) == (["abc123"], [0, *UPDATES], 2)
    page = written["credit2.md"].decode()
    assert "Nothing was learned" not in page
    assert "**`contrast`, `product`**; the largest at equal change is `product`" in page
    assert "(of shuffled_contrast): none" in page
    runs = pd.read_csv(output / "credit2.csv")
    assert len(runs[runs["measure"] == EQUAL_CHANGE]) == 6 * 4
    assert {test["role"] for test in facts["tests"]} == {"candidates", "control", "told"}
    # Nothing is told before every run is evaluated.
    for run in ("vipo-s100", "oracle-s103"):
        (folder / "evaluation" / run / "scores.parquet").unlink()
    with pytest.raises(ReportError, match=r"2 of 29 runs are not evaluated \(vipo-s100, oracle-s103\)"):
        write_registered(credit2, tmp_path / "results", output)
    told = CliRunner().invoke(app, ["registered", "credit2", "-o", str(output), "--results", str(tmp_path / "results")])
    assert "114 of 141 runs are not evaluated" in str(told.exception)


def test_what_was_not_registered_is_refused(tmp_path: Path, credit2: Config) -> None:
    other = credit2.experiment.model_copy(update={"registered": None})
    with pytest.raises(ConfigError, match="has no section 'registered'"):
        write_registered(credit2.model_copy(update={"experiment": other}), tmp_path, tmp_path)
    for change, message in (
        ("registered.families.candidates.nobody=grpo", "nobody: no such arm"),
        ("arms.oracle.seeds=[100,101]", "'oracle' and 'grpo' are paired by seed"),
        ("registered.families.told={vipo:grpo}", "families: told: the roles of other arms"),
    ):
        sign = "+" if "nobody" in change or "families.told" in change else ""
        with pytest.raises(ConfigError, match=message):
            load_config(["experiment=credit2", "arm=base", f"{sign}experiment.{change}"])


@pytest.mark.parametrize("name", ["objectives", "objectives_scene"])
def test_objectives_are_compared_by_their_credit_alone(name: str) -> None:
    """With contrast and without: ratios per position, which credit needs, and the credit; nothing else."""
    first = load_config([f"experiment={name}", "arm=base"])
    rule = first.experiment.registered
    assert rule is not None
    for arm, reference in rule.families["credit"].items():
        pair = [
            load_config([f"experiment={name}", f"arm={own}", "seed=200"]).training_identity()
            for own in (arm, reference)
        ]
        ratios = [own["objective"].pop("ratio", None) for own in pair]
        credit = [own.pop("credit") for own in pair]
        assert ratios in (["position", "sample"], [None, None])
        assert [[source["name"] for source in own["sources"]] for own in credit] == [["contrast"], []]
        assert {**pair[0], "arm": None} == {**pair[1], "arm": None}
