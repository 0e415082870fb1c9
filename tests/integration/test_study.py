"""The study's comparisons and its decision against closed forms on drawn curves."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from integration.report_fixture import build_experiment
from omegaconf import OmegaConf
from scipy import stats

from vipo.config.arms import StudyConfig
from vipo.config.compose import load_config_file, repository_root
from vipo.evaluation.matched import matched_arms
from vipo.evaluation.means import ScoresError
from vipo.evaluation.statistics import seed_interval
from vipo.evaluation.study import SELECTIVITY, clip_table, compare_over_seeds, decide
from vipo.reporting.study import StudyError, build_study

REWARD = "reward/r"
UPDATES = (4, 8, 12)


def _scores(slopes: dict[str, dict[int, float]], per_change: dict[str, float]) -> pd.DataFrame:
    """Reward rises by its slope an update from 0.1; the change is the gain over `per_change`, 3 : 1 on the object."""
    rows = []

    def add(arm: str, seed: int, update: int, reward: float, change: float) -> None:
        for prompt in ("a", "b"):
            shift = 0.01 if prompt == "a" else -0.01
            row = {
                "run": f"{arm}-s{seed}",
                "arm": arm,
                "seed": seed,
                "update": update,
                "prompt_id": prompt,
                "sample": 0,
            }
            row |= {"final": update in (0, UPDATES[-1]), REWARD: reward + shift, "change/total": change}
            rows.append(row | {"change/foreground": 1.5 * change, "change/background": 0.5 * change})

    add("base", 0, 0, 0.1, 0.0)
    for arm, seeds in slopes.items():
        for seed, slope in seeds.items():
            for update in UPDATES:
                add(arm, seed, update, 0.1 + slope * update, slope * update / per_change[arm])
    return pd.DataFrame(rows)


SCORES = _scores(
    {
        "grpo": {seed: 0.02 + 0.001 * seed for seed in range(10)},
        "quick": {seed: 0.03 + 0.001 * seed for seed in range(10)},
        "local": {seed: 0.01 + 0.001 * seed for seed in range(10)},
    },
    {"grpo": 2.0, "quick": 2.0, "local": 4.0},
)


def test_interval_over_seeds_is_students() -> None:
    values = [0.1, 0.3, 0.2, 0.5]
    found = seed_interval(values, 0.9)
    low, high = stats.t.interval(0.9, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.estimate, found.low, found.high) == pytest.approx((0.275, low, high))
    assert seed_interval([0.2, 0.2]).low == pytest.approx(0.2)
    with pytest.raises(ScoresError, match="at least two finite"):
        seed_interval([0.1])


def test_arms_are_matched_where_all_got_to() -> None:
    points = matched_arms(SCORES, ("local", "grpo"), REWARD, ["change/total"]).set_index(["arm", "seed"])
    # The slower arm's end, 0.1 + 12 slope; its change is the gain over 4, the other's over 2 at the same gain.
    for seed in range(10):
        gain = 12 * (0.01 + 0.001 * seed)
        ours, theirs = points.loc[("local", seed)], points.loc[("grpo", seed)]
        assert ours["level"] == theirs["level"] == pytest.approx(0.1 + gain)
        assert (ours["change/total"], theirs["change/total"]) == pytest.approx((gain / 4, gain / 2))
        assert (ours["update"], theirs["update"]) == pytest.approx((12, gain / (0.02 + 0.001 * seed)))
    # A third arm that got less far lowers the level for all.
    slower = _scores({"grpo": {0: 0.02}, "local": {0: 0.01}, "slow": {0: 0.005}}, {"grpo": 2, "local": 4, "slow": 2})
    three = matched_arms(slower, ("grpo", "local", "slow"), REWARD, [])
    assert three["level"].tolist() == pytest.approx([0.1 + 12 * 0.005] * 3)


def test_an_arm_that_never_moved_is_skipped_and_counted() -> None:
    still = _scores(
        {"grpo": dict.fromkeys(range(3), 0.02), "idle": {0: 0.01, 1: 0.01, 2: -0.01}}, {"grpo": 2, "idle": 2}
    )
    table = compare_over_seeds(still, "grpo", REWARD, [REWARD, "change/total"], 0.95)
    by = table.set_index(["matched", "column"])
    assert by.loc[("updates", REWARD), ["seeds", "skipped"]].tolist() == [3, 0]
    assert by.loc[("reward", "change/total"), ["seeds", "skipped"]].tolist() == [2, 1]


def test_a_faster_arm_differs_at_equal_updates_alone() -> None:
    columns = [REWARD, "change/total", "change/foreground", "change/background"]
    table = compare_over_seeds(SCORES, "grpo", REWARD, columns, 0.95).set_index(["arm", "matched", "column"])
    assert table.loc[("quick", "updates", REWARD), "difference"] == pytest.approx(0.12)
    assert table.loc[("quick", "change", REWARD), "difference"] == pytest.approx(0, abs=1e-12)
    assert table.loc[("quick", "reward", "change/total"), "difference"] == pytest.approx(0, abs=1e-12)
    assert table.loc[("local", "change", REWARD), "difference"] > 0
    assert table.loc[("local", "updates", REWARD), "difference"] < 0
    assert table.loc[("local", "reward", SELECTIVITY), "mean"] == pytest.approx(0.75)


def test_the_decision_needs_fresh_seeds() -> None:
    study = StudyConfig(
        metric=REWARD,
        matched_on="change/total",
        reference="grpo",
        candidates=("quick", "local"),
        choose_seeds=(0, 1, 2, 3, 4),
        confirm_seeds=(5, 6, 7, 8, 9),
    )
    found = decide(SCORES, study, 0.95)
    assert (found.chosen, found.default) == ("local", "local")
    assert found.choosing["quick"].estimate == pytest.approx(0, abs=1e-12)
    only_quick = study.model_copy(update={"candidates": ("quick",)})
    assert decide(SCORES, only_quick, 0.95).default == "grpo"
    with pytest.raises(ValueError, match=r"fresh: \[4\]"):
        StudyConfig.model_validate(study.model_dump() | {"confirm_seeds": (4, 5)})


def test_clip_table_averages_over_seeds() -> None:
    metrics = pd.DataFrame({"arm": ["grpo", "grpo", "quick"], "update": [1, 2, 1], "clip/share": [0.1, 0.3, 0.5]})
    cells = pd.DataFrame(
        {"arm": ["grpo", "quick"], "ratio": "position", "scope": "sample", "gate": "ppo", "range": 0.1}
    )
    table = clip_table(SCORES, metrics, cells, [REWARD]).set_index("arm")
    assert table.loc["grpo", "clipped"] == pytest.approx(0.2)
    finals = [0.1 + 12 * (0.02 + 0.001 * seed) for seed in range(10)]
    assert table.loc["grpo", REWARD] == pytest.approx(np.mean(finals))
    assert table.loc["grpo", f"{REWARD}_std"] == pytest.approx(np.std(finals, ddof=1))


def _decide_on_vipo(path: Path, seeds: dict[str, list[int]]) -> None:
    """Give the resolved configuration at `path` a section `study`."""
    config = OmegaConf.load(path)
    for arm in ("grpo", "vipo"):
        config.experiment.arms[arm].seeds = seeds[arm]
    config.experiment.study = {
        "metric": "reward/object_redness",
        "matched_on": "change/total",
        "reference": "grpo",
        "candidates": ["vipo"],
        "choose_seeds": [0, 1],
        "confirm_seeds": [2, 3],
    }
    OmegaConf.save(config, path)


def test_study_page(tmp_path: Path) -> None:
    seeds = {"base": [0], "grpo": [0, 1, 2, 3], "vipo": [0, 1, 2, 3], "inverted": [0, 1]}
    folder, runs = build_experiment(tmp_path, seeds)
    first = folder / "evaluation" / "base-s0" / "config.yaml"
    with pytest.raises(StudyError, match="no section 'study'"):
        build_study([(folder, runs, load_config_file(first))], tmp_path / "study")
    _decide_on_vipo(first, seeds)
    studied = [(folder, runs, load_config_file(first))]
    page = build_study(studied, tmp_path / "study")
    assert page.read_text().startswith("# The study's results")
    written = json.loads((tmp_path / "study" / "decision.json").read_text())
    assert written["chosen"] == "vipo"
    table = pd.read_csv(tmp_path / "study" / "demo-compared.csv")
    assert set(table["matched"]) == {"updates", "reward", "change"}
    assert (tmp_path / "study" / "demo-paths.svg").is_file()
    # Where no arm raises the reward there is no common level of it: that panel says so.
    for scores in (folder / "evaluation").glob("*/scores.parquet"):
        flat = pd.read_parquet(scores)
        flat.assign(
            **{"reward/object_redness": flat["reward/object_redness"].where(flat["update"] == 0, -1.0)}
        ).to_parquet(scores)
    build_study(studied, tmp_path / "study")
    assert "no common level" in (tmp_path / "study" / "demo-differences.svg").read_text()
    before = {path.name: path.read_bytes() for path in (tmp_path / "study").iterdir()}
    build_study(studied, tmp_path / "study")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "study").iterdir()}
    # Its folder is replaced as a whole: what is no study's would be lost.
    (tmp_path / "study/notes.txt").write_text("mine")
    for output, held in ((tmp_path / "study", "'notes.txt', which no study made"), (folder, "'evaluation'")):
        names = sorted(output.rglob("*"))
        with pytest.raises(StudyError, match=held):
            build_study(studied, output)
        assert sorted(output.rglob("*")) == names


def test_the_page_links_to_nothing_that_the_study_would_not_write_again(tmp_path: Path) -> None:
    """`make study` replaces docs/study as a whole: what else lies there would be lost."""
    seeds = {"base": [0], "grpo": [0, 1, 2, 3], "vipo": [0, 1, 2, 3], "product": [0, 1]}
    folder, runs = build_experiment(tmp_path / "maps", seeds)
    first = folder / "evaluation" / "base-s0" / "config.yaml"
    _decide_on_vipo(first, seeds)
    # The same arms, as if nothing but the gate's range told them apart.
    gates, _ = build_experiment(tmp_path / "gates", seeds)
    for path in gates.glob("evaluation/*/config.yaml"):
        config = OmegaConf.load(path)
        config.experiment.name = "gates"
        gate = {"range": 1.0 + list(seeds).index(config.arm)}
        config.objective = OmegaConf.merge(config.objective, {"ratio": "position", "gate": gate})
        config.credit.sources = [{"name": "backbone"}]
        config.perception.normalize = "minmax"
        OmegaConf.save(config, path)
    base = gates / "evaluation" / "base-s0" / "config.yaml"
    studied = [(folder, runs, load_config_file(first)), (gates, runs, load_config_file(base))]
    build_study(studied, tmp_path / "study")
    written = {path.name for path in (tmp_path / "study").iterdir()}

    root = repository_root()
    names = next(re.finditer(r"^STUDY := (.+)$", (root / "Makefile").read_text(), re.MULTILINE))[1].split()
    possible = {re.sub("^(demo|gates)(?=-)", name, file) for name in names for file in written}
    linked = set(re.findall(r"\]\(study/([^)#]+)", (root / "docs/method.md").read_text()))
    assert len(linked) >= 3
    assert linked <= possible
    assert {path.name for path in (root / "docs/study").iterdir()} <= possible
