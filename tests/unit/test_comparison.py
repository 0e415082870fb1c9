"""Tables of a set, against explicit loops and published procedures."""

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from vipo.config.compose import load_config
from vipo.evaluation.compare import _geneval_columns, compare_runs
from vipo.evaluation.comparison import (
    by_category,
    holm,
    over_metrics,
    win_rates,
)
from vipo.evaluation.diversity import SIDE, diversity
from vipo.evaluation.held_out import EvaluationError, HeldOut, sample_name, save_sample
from vipo.evaluation.means import ScoresError
from vipo.evaluation.totals import _VBENCH_BOUNDS, _VBENCH_QUALITY, _VBENCH_SEMANTIC, set_totals, vbench_totals
from vipo.prompts import Prompt, PromptError

_VBENCH_TOTALS = ("vbench/quality", "vbench/semantic", "vbench/total")
COLUMNS = ["reward/a", "reward/b", "reward/c"]


def _scores(prompts: int = 30, effect: float = 0.4) -> pd.DataFrame:
    rng, rows = np.random.default_rng(0), []
    for prompt, sample in itertools.product(range(prompts), range(2)):
        base = rng.normal(size=3)
        for arm, seed in (("base", 0), ("vipo", 0), ("vipo", 1)):
            gain = np.array([effect, 0.0, -effect]) if arm == "vipo" else np.zeros(3)
            own = base + (gain + rng.normal(scale=0.5, size=3)) * (arm == "vipo")
            row = {"run": f"{arm}-s{seed}", "arm": arm, "seed": seed, "update": int(arm == "vipo"), "final": True}
            rows.append({**row, "prompt_id": f"{prompt:04d}", "sample": sample, **dict(zip(COLUMNS, own, strict=True))})
    return pd.DataFrame(rows)


def test_holm_is_the_step_down_procedure() -> None:
    values = [0.01, 0.04, 0.03, 0.005]
    assert holm(values) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # By its definition: reject in order of size while p <= alpha / (m - k).
    rng = np.random.default_rng(1)
    for _ in range(50):
        p, alpha = rng.uniform(0, 0.2, size=6), 0.05
        rejected = set()
        for k, index in enumerate(np.argsort(p)):
            if p[index] > alpha / (6 - k):
                break
            rejected.add(int(index))
        assert {int(index) for index in np.flatnonzero(holm(p) <= alpha)} == rejected


def test_holm_is_the_closure_of_bonferronis_tests() -> None:
    """Holm (1979): a hypothesis falls where every intersection that it is part of falls by Bonferroni."""
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 4):
        p = [float(value) for value in rng.uniform(0, 0.4, count)]
        sets = [held for size in range(1, count + 1) for held in itertools.combinations(range(count), size)]
        bonferroni = {held: min(1, len(held) * min(p[place] for place in held)) for held in sets}
        expected = [max(value for held, value in bonferroni.items() if place in held) for place in range(count)]
        assert holm(p) == pytest.approx(expected)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_all_metrics_at_once_are_wider_than_one() -> None:
    scores = _scores()
    table = over_metrics(scores, COLUMNS, resamples=4000).set_index("column")
    alone = over_metrics(scores, COLUMNS[1:2], resamples=4000).set_index("column")
    means = scores.groupby(["arm", "prompt_id"])[COLUMNS].mean()
    for column in COLUMNS:
        difference = means.loc["vipo"][column] - means.loc["base"][column]
        row = table.loc[column]
        assert row["difference"] == pytest.approx(difference.mean())
        expected = stats.ttest_1samp(difference, 0).pvalue
        assert row["p"] == pytest.approx(expected, abs=0.02)
        assert row["p_holm"] >= row["p"]
    # Two prompts prove nothing, however the draws lie.
    assert over_metrics(scores[scores["prompt_id"] < "0002"], COLUMNS, resamples=4000)["p"].min() > 0.1
    assert list(table["p_holm"]) == pytest.approx(list(holm(table["p"])))
    assert table.loc["reward/a", "low"] > 0 > table.loc["reward/c", "high"]
    # The last one that Holm tests is tested at the plain level.
    for limit in ("low", "high"):
        assert table.loc["reward/b", limit] == pytest.approx(alone.loc["reward/b", limit])
    assert over_metrics(scores, COLUMNS, resamples=4000).set_index("column").equals(table)


def test_wins_are_counted_and_a_tie_is_half_a_win() -> None:
    scores = _scores(4)
    scores.loc[scores["arm"] == "vipo", "reward/a"] = [1.0] * 16
    base = scores["arm"] == "base"
    scores.loc[base, "reward/a"] = [0.0, 1.0, 2.0, 0.0, 0.0, 1.0, 2.0, 2.0]
    row = win_rates(scores, ["reward/a"]).iloc[0]
    assert (row["samples"], row["wins"], row["ties"], row["rate"]) == (16, 6, 4, 0.5)
    with pytest.raises(ScoresError, match="no counterpart"):
        win_rates(scores[~(base & (scores["prompt_id"] == "0001"))], ["reward/a"])


def test_categories_are_means_of_their_prompts() -> None:
    scores = _scores(6)
    categories = {f"{number:04d}": ("odd" if number % 2 else "even") for number in range(5)}
    table = by_category(scores, categories, COLUMNS[:1]).set_index(["arm", "category"])
    assert dict(table["prompts"]) == {
        (arm, kind): n for arm in ("base", "vipo") for kind, n in (("even", 3), ("odd", 2))
    }
    # A prompt of several categories counts in each, one of none nowhere.
    both = {**{prompt: (kind,) for prompt, kind in categories.items()}, "0000": ("odd", "even"), "0005": ()}
    assert dict(by_category(scores, both, COLUMNS[:1]).set_index(["arm", "category"])["prompts"]) == {
        (arm, kind): 3 for arm in ("base", "vipo") for kind in ("even", "odd")
    }
    own = scores[(scores["arm"] == "vipo") & scores["prompt_id"].isin(["0001", "0003"])]
    assert table.loc[("vipo", "odd"), "reward/a"] == pytest.approx(own["reward/a"].mean())


def test_totals_are_of_the_set_or_say_what_is_missing() -> None:
    rows = [("00", 1.0), ("01", 0.0), ("02", 1.0), ("03", 1.0)]
    metadata = {prompt: {"tag": "counting" if prompt < "02" else "colors"} for prompt, _ in rows}
    frame = pd.DataFrame({"arm": "base", "final": True, "prompt_id": [p for p, _ in rows]})
    frame["reward/geneval"] = [value for _, value in rows]
    found = set_totals(frame, metadata).set_index("total")
    assert found.loc["geneval", "value"] == pytest.approx((0.5 + 1) / 2)
    assert found["value"].isna()["vbench"]
    assert found.loc["vbench", "note"].startswith("not measured: subject_consistency, ")
    assert "tag" in set_totals(frame, {}).set_index("total").loc["geneval", "note"]
    # VBench: of a model that is at the upper bound everywhere, 1; and at the lower one, 0.
    low = {"subject_consistency": 0.1462, "background_consistency": 0.2615, "temporal_flickering": 0.6293}
    low |= {"motion_smoothness": 0.706, "appearance_style": 0.0009}
    high = {"motion_smoothness": 0.9975, "scene": 0.8222, "appearance_style": 0.2855, "temporal_style": 0.364}
    high |= {"overall_consistency": 0.364}
    names = [*low, *high, "aesthetic_quality", "imaging_quality", "dynamic_degree", "object_class", "multiple_objects"]
    names += ["human_action", "color", "spatial_relationship"]
    # Every prompt is of every dimension.
    metadata = {prompt: {**row, "dimension": names} for prompt, row in metadata.items()}
    for bounds, other, total in ((low, 0.0, 0.0), (high, 1.0, 1.0)):
        table = frame.assign(**{f"reward/vbench_{name}": bounds.get(name, other) for name in names})
        assert set_totals(table, metadata).set_index("total").loc["vbench", "value"] == pytest.approx(total)
    # Quality counts four times, dynamic degree half of another dimension.
    table = frame.assign(**{f"reward/vbench_{name}": low.get(name, 0.0) for name in names})
    table["reward/vbench_dynamic_degree"] = 1.0
    expected = 4 * 0.5 / 6.5 / 5
    assert set_totals(table, metadata).set_index("total").loc["vbench", "value"] == pytest.approx(expected)


def test_vbench_measures_a_dimension_on_its_own_prompts_alone() -> None:
    names = [*_VBENCH_QUALITY, *_VBENCH_SEMANTIC]
    columns = {name: f"reward/vbench_{name}" for name in names}
    frame = pd.DataFrame({"arm": "base", "final": True, "prompt_id": names})
    for name, column in columns.items():
        # At its upper bound where it is asked for, and no number, or one that counts nowhere, on the others.
        foreign = float("nan") if name in _VBENCH_SEMANTIC else -5.0
        frame[column] = [_VBENCH_BOUNDS.get(name, (0.0, 1.0))[1] if own == name else foreign for own in names]
    metadata = {name: {"dimension": [name, "another"]} for name in names}
    found = set_totals(frame, metadata).set_index("total").loc["vbench"]
    assert found["value"] == pytest.approx(1)
    assert found["note"].endswith("each dimension on its own of 16 prompts")
    assert vbench_totals(frame, metadata) == pytest.approx(dict.fromkeys(_VBENCH_TOTALS, 1))
    # A sample of its own that has no score is told; a dimension without any, or without prompts, is not measured.
    more = pd.concat([frame, frame.assign(**dict.fromkeys(columns.values(), float("nan")))], ignore_index=True)
    found = set_totals(more, metadata).set_index("total").loc["vbench"]
    assert found["value"] == pytest.approx(1)
    assert found["note"].endswith(", 16 samples without a score")
    for fewer, left in ((frame[frame["prompt_id"] != "scene"], metadata), (frame, {**metadata, "scene": {}})):
        found = set_totals(fewer, left).set_index("total").loc["vbench"]
        assert (found["value"], found["note"]) == (
            None,
            "not measured on prompts whose 'dimension' names it: scene",
        )
        assert vbench_totals(fewer, left) == {}
    assert vbench_totals(frame, {}) == {}


def test_genevals_total_is_of_its_reward_whatever_its_label() -> None:
    frame = pd.DataFrame({"arm": "base", "final": True, "prompt_id": ["a", "b"], "reward/mine": [1.0, 0.0]})
    metadata = {prompt: {"tag": "counting"} for prompt in "ab"}
    found = set_totals(frame, metadata, ["reward/mine"]).set_index("total")
    assert (found.loc["geneval (mine)", "value"], "geneval" in found.index) == (0.5, False)
    specs = ["evaluation.rewards=[{name: geneval, label: mine}, redness,"]
    specs += ["{name: process, label: there, options: {reward: geneval, url: 'http://127.0.0.1:1'}}]"]
    config = load_config(["experiment=demo", " ".join(specs)])
    assert _geneval_columns(config) == ["reward/mine", "reward/there"]


@pytest.mark.parametrize("frames", [None, 3])
def test_diversity_is_the_mean_distance_of_a_prompts_samples(frames: int | None, tmp_path: Path) -> None:
    shape = (3, 32, 48) if frames is None else (frames, 3, 32, 48)
    samples = [HeldOut(Prompt(f"{p:016x}", str(p), {}), n) for p in range(2) for n in range(3)]
    samples.append(HeldOut(Prompt("f" * 16, "alone", {}), 0))
    pictures = (torch.rand(len(samples), *shape, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    for sample, image in zip(samples, pictures, strict=True):
        save_sample(image, tmp_path / f"{sample_name(7, sample)}.png", 8)
    found = diversity(tmp_path, 7, samples, video=frames is not None)
    assert list(found) == [f"{p:016x}" for p in range(2)]
    for p in range(2):
        own = pictures[3 * p : 3 * p + 3].reshape(3, -1, 3, SIDE, 32 // SIDE, SIDE, 48 // SIDE).mean(dim=(4, 6)).numpy()
        pairs = [np.sqrt(np.mean((own[i] - own[j]) ** 2)) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert found[f"{p:016x}"] == pytest.approx(np.mean(pairs), rel=1e-5)


def test_runs_that_another_process_scored_are_not_compared(tmp_path: Path) -> None:
    def write(run: str, version: str) -> None:
        record = tmp_path / "evaluation" / run / "provenance.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        told = {"r": {"reward": "a:b", "packages": {"x": version}}}
        record.write_text(json.dumps({"stage": "score", "inputs": [], "outputs": [], "reward_processes": told}))

    config = load_config(["experiment=demo", "arm=base"])
    write("base-s0", "1")
    write("grpo-s0", "2")
    with pytest.raises(EvaluationError, match="reward 'r': another process scored grpo-s0 than base-s0"):
        compare_runs(config, tmp_path, ["base-s0", "grpo-s0"])
    write("grpo-s0", "1")
    with pytest.raises(PromptError, match=r"eval\.jsonl"):
        compare_runs(config, tmp_path, ["base-s0", "grpo-s0"])


CLIP = {"clip/config.json": "c", "clip/model.safetensors": "w"}


@pytest.mark.parametrize(
    ("told", "files"),
    [
        # As an earlier vipo recorded them, which did not say whose a file is.
        ("before", {**CLIP, "clip/model.safetensors": "x"}),
        ("now", {**CLIP, "clip/model.safetensors": "x"}),
        ("now", {"clip/config.json": "c", "clip/pytorch_model.bin": "x"}),
        ("now", {"clip/config.json": "d", "clip/model.safetensors": "w"}),
        ("now", {"clip/config.json": "c"}),
    ],
)
def test_runs_that_other_weights_scored_are_not_compared(told: str, files: dict[str, str], tmp_path: Path) -> None:
    def write(run: str, backbone: str, read: dict[str, str], told: str = told) -> None:
        record = tmp_path / "evaluation" / run / "provenance.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        own = {"of": "reward clipscore"} if told == "now" else {}
        mine = [
            ("prompts/eval.jsonl", "p", {}),
            (f"samples/{run}/pictures", run, {}),
            ("net.safetensors", backbone, {}),
        ]
        mine += [(path, sha256, own) for path, sha256 in read.items()]
        inputs = [{"path": path, "bytes": 1, "sha256": sha256, **more} for path, sha256, more in mine]
        perception = {"backbone": "resnet50.a1_in1k", "weights": None}
        config = {"perception": perception}
        record.write_text(json.dumps({"stage": "score", "config": config, "inputs": inputs, "outputs": []}))

    config = load_config(["experiment=demo", "arm=base"])
    runs = ["base-s0", "grpo-s0", "vipo-s0"]
    write("base-s0", "n", CLIP)
    # Another backbone scores nothing, and another cache may hold more of a tokenizer.
    write("grpo-s0", "m", {**CLIP, "clip/vocab.json": "v"}, "now")
    write("vipo-s0", "n", files)
    one, other = ("base-s0", "vipo-s0") if len(files) == 1 else ("vipo-s0", "base-s0")
    message = rf"^clip/\S+: rewards of {one} were read from it, and those of {other} .* evaluate both by the same files"
    with pytest.raises(EvaluationError, match=message):
        compare_runs(config, tmp_path, runs)
    write("vipo-s0", "n", CLIP)
    with pytest.raises(PromptError, match=r"eval\.jsonl"):
        compare_runs(config, tmp_path, runs)


def test_runs_of_two_titles_are_not_put_into_one_table(tmp_path: Path) -> None:
    config = load_config(["experiment=demo", "arm=base"])
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/eval.jsonl").write_text("")
    for run, shift in (("base-s0", 3), ("grpo-s0", 10)):
        folder = tmp_path / "evaluation" / run
        folder.mkdir(parents=True)
        (folder / "provenance.json").write_text(json.dumps({"stage": "score", "inputs": [], "outputs": []}))
        pd.DataFrame({"run": [run], "protocol": f"parti v2 (0): shift {shift}"}).to_parquet(folder / "scores.parquet")
    with pytest.raises(EvaluationError, match=r"grpo-s0: was evaluated by parti v2 .*: shift 10, not by .*: shift 3;"):
        compare_runs(config, tmp_path, ["base-s0", "grpo-s0"])
    parti = load_config(["experiment=demo", "arm=base", "protocol=parti"])
    assert str(parti.protocol_title).startswith("parti v2 (")
    with pytest.raises(EvaluationError, match=r"base-s0: was evaluated by parti v2 \(0\): shift 3, not by parti v2"):
        compare_runs(parti, tmp_path, ["base-s0"])


def test_runs_are_compared_by_what_all_of_them_measured(tmp_path: Path) -> None:
    config = load_config(["experiment=demo", "arm=base"])
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/eval.jsonl").write_text("")
    for run, columns in (("base-s0", ["reward/a", "reward/b"]), ("grpo-s0", ["reward/a"])):
        folder = tmp_path / "evaluation" / run
        folder.mkdir(parents=True)
        (folder / "provenance.json").write_text(json.dumps({"stage": "score", "inputs": [], "outputs": []}))
        pd.DataFrame({"run": [run], **dict.fromkeys(columns, 0.5)}).to_parquet(folder / "scores.parquet")
    with pytest.raises(EvaluationError, match=r"grpo-s0: reward/b is measured of it or of base-s0, not of both"):
        compare_runs(config, tmp_path, ["base-s0", "grpo-s0"])


def test_where_no_metric_is_left_there_is_no_difference() -> None:
    """Beside the note that says so."""
    scores = pd.DataFrame(
        {"run": ["base-s0"], "arm": ["base"], "final": [True], "update": [0], "prompt_id": ["a"], "sample": [0]}
    )
    other = scores.assign(run="grpo-s0", arm="grpo")
    found = over_metrics(pd.concat([scores, other]), [], resamples=10, confidence=0.95, seed=0)
    assert found.empty
    assert "p_holm" in found
