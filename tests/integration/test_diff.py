"""`vipo diff`: every layer of difference is found, and what came of it is the statistics' own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from report_fixture import build_experiment

from vipo.config.compose import load_config_file
from vipo.config.values import config_hash
from vipo.errors import VipoError
from vipo.evaluation.statistics import independent_difference, paired_difference
from vipo.handover.diff import RunDiff, diff_runs
from vipo.handover.diff_text import render_diff
from vipo.provenance import file_sha256

RUNS = ("base-s0", "grpo-s0", "vipo-s0", "vipo-s1")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the report's fixture with the records that stages leave."""
    folder, _ = build_experiment(tmp_path_factory.mktemp("built"), {"base": [0], "grpo": [0], "vipo": [0, 1]})
    for number, run in enumerate(RUNS):
        _record_evaluation(folder, run)
        if run != "base-s0":
            weights = {"path": f"results/demo/runs/{run}/weights/a.safetensors", "bytes": 1, "sha256": f"{number}" * 64}
            _edit(folder / "runs" / run / "provenance.json", lambda record, new=weights: record.update(outputs=[new]))
    return folder


@pytest.fixture
def experiment(built: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(built, tmp_path / "results" / "demo")


def _record_evaluation(folder: Path, run: str) -> None:
    config = load_config_file(folder / "evaluation" / run / "config.yaml")
    scores = folder / "evaluation" / run / "scores.parquet"
    output = {"path": f"results/demo/evaluation/{run}/scores.parquet", "bytes": 1, "sha256": file_sha256(scores)}
    record = {
        "stage": "score",
        "config_sha256": config_hash(config.evaluation_identity()),
        "inputs": [{"path": "results/demo/prompts/eval.jsonl", "bytes": 1, "sha256": "aa" * 32}],
        "outputs": [output],
        "package_sha256": "ab" * 32,
        "git": {"commit": "01" * 20, "dirty": False, "diff_sha256": None},
        "lock_sha256": "cd" * 32,
        "container_digest": None,
        "hardware": {"cpu": "Example CPU", "gpus": []},
        "versions": {"torch": "2.15.0"},
    }
    (folder / "evaluation" / run / "provenance.json").write_text(json.dumps(record))


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def _diff(experiment: Path, a: str, b: str) -> RunDiff:
    return diff_runs(experiment / "runs" / a, experiment / "runs" / b)


def test_a_run_does_not_differ_from_itself(experiment: Path) -> None:
    found = _diff(experiment, "vipo-s0", "vipo-s0")
    assert (found.config, found.code, found.environment, found.data, found.notes) == ((), (), (), (), ())
    assert found.recorded == ("train", "score")
    assert found.training is not None
    assert found.training.equal_updates == 24
    assert found.training.same_weights
    assert found.evaluation is not None
    assert all((row.difference, row.low, row.high) == (0, 0, 0) for row in found.evaluation.scores)
    text = render_diff(found)
    assert text.count("no difference\n") == 4
    assert "are equal in 24 updates" in text
    assert "Final weights: the same." in text


def test_configuration_says_what_a_key_decides(experiment: Path) -> None:
    path = experiment / "evaluation" / "vipo-s1" / "config.yaml"
    text = path.read_text()
    for old, new in (
        ("checkpoint_every: 5", "checkpoint_every: 7"),
        ("  steps: 20", "  steps: 10"),
        ("  lora: null", "  lora: {rank: 4, alpha: 4.0, targets: [to_q]}"),
        ("bootstrap: 200", "bootstrap: 300"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    _record_evaluation(experiment, "vipo-s1")
    rows = _diff(experiment, "vipo-s0", "vipo-s1").config
    assert [row.decides for row in rows] == ["training"] * 4 + ["evaluation"] + ["nothing"] * 3
    found = {row.key: row for row in rows}
    assert {key: row.decides for key, row in found.items()} == {
        "seed": "training",
        "training.lora.rank": "training",
        "training.lora.alpha": "training",
        "training.lora.targets": "training",
        "training.lora.init": "nothing",
        "training.checkpoint_every": "nothing",
        "evaluation.steps": "evaluation",
        "evaluation.bootstrap": "nothing",
    }
    assert (found["training.lora.rank"].a, found["training.lora.rank"].b) == (None, 4)
    assert (found["evaluation.steps"].a, found["evaluation.steps"].b) == (20, 10)


def test_code_environment_and_data(experiment: Path) -> None:
    def train(record: dict[str, Any]) -> None:
        record["package_sha256"] = "99" * 32
        record["git"]["dirty"] = True
        record["versions"]["torch"] = "2.16.0"
        record["hardware"]["gpus"] = ["Example GPU"]
        record["inputs"] = [
            {"path": "/elsewhere/results/x/prompts/train.jsonl", "bytes": 1, "sha256": "11" * 32},
            {
                "path": "data/other",
                "bytes": 2,
                "sha256": "22" * 32,
                "files": {
                    "model_index.json": {"bytes": 1, "sha256": "33" * 32},
                    "vae/config.json": {"bytes": 1, "sha256": "44" * 32},
                },
            },
        ]

    def other(record: dict[str, Any]) -> None:
        train(record)
        record["inputs"][0]["sha256"] = "55" * 32
        # What the runs made themselves is no data that they were made from.
        record["inputs"] += [
            {"path": "results/x/samples/vipo-s0/samples.json", "bytes": 1, "sha256": "77" * 32},
            {
                "path": "results/x/samples/vipo-s0/pictures",
                "bytes": 1,
                "sha256": "88" * 32,
                "files": {"u1-0-0.png": {"bytes": 1, "sha256": "88" * 32}},
            },
        ]
        record["inputs"][1]["path"] = "data/demo-generator"
        record["inputs"][1]["files"]["vae/config.json"]["sha256"] = "66" * 32
        record["package_sha256"] = "ab" * 32
        record["git"]["dirty"] = False
        record["versions"]["torch"] = "2.15.0"

    _edit(experiment / "runs/grpo-s0/provenance.json", train)
    _edit(experiment / "runs/vipo-s0/provenance.json", other)
    _edit(experiment / "evaluation/grpo-s0/provenance.json", lambda record: record.update(package_sha256="99" * 32))
    found = _diff(experiment, "grpo-s0", "vipo-s0")
    assert found.code is not None
    assert found.environment is not None
    assert found.data is not None
    assert [(row.key, row.stages, row.a, row.b) for row in found.code] == [
        ("package_sha256", ("train", "score"), "99" * 32, "ab" * 32),
        ("git.dirty", ("train",), True, False),
    ]
    assert [(row.key, row.a, row.b) for row in found.environment] == [("versions.torch", "2.16.0", "2.15.0")]
    assert [(row.key, row.a, row.b) for row in found.data] == [
        ("prompts/train.jsonl", "11" * 32, "55" * 32),
        ("generator: vae/config.json", "44" * 32, "66" * 32),
    ]
    text = render_diff(found)
    assert "| 999999999999… | abababababab… | train score |" in text
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["code"][0]["a"] == "99" * 32


def test_outcomes_are_the_statistics_own(experiment: Path) -> None:
    found = _diff(experiment, "grpo-s0", "vipo-s0")
    tables = [pd.read_parquet(experiment / "evaluation" / run / "scores.parquet") for run in ("grpo-s0", "vipo-s0")]
    left, right = (table[table["final"]] for table in tables)
    assert found.evaluation is not None
    assert found.evaluation.unpaired is None
    assert len(found.evaluation.scores) == 6
    for row in found.evaluation.scores:
        expected = paired_difference(right, left, row.column, resamples=200, seed=1234)
        assert (row.difference, row.low, row.high) == (expected.estimate, expected.low, expected.high)
        assert row.a == pytest.approx(left[row.column].mean())
        assert row.b - row.a == pytest.approx(row.difference)
        assert row.better == ("higher" if row.column == "reward/object_redness" else None)
    metrics = [json.loads(line) for line in (experiment / "runs/vipo-s0/metrics.jsonl").read_text().splitlines()]
    assert found.training is not None
    last = {row.metric: row for row in found.training.metrics}
    assert last["reward/mean"].b == metrics[-1]["reward/mean"]
    assert (last["map/mean"].a, last["map/mean"].b) == (None, metrics[-1]["map/mean"])
    assert found.training.equal_updates == 0
    assert found.training.same_weights is False
    text = render_diff(found)
    assert "paired by prompt and noise; 95% intervals, conditional on these seeds" in text
    assert "NOT" not in text


def _fewer_prompts(experiment: Path) -> None:
    path = experiment / "evaluation/vipo-s0/scores.parquet"
    table = pd.read_parquet(path)
    table[table["prompt_id"] != table["prompt_id"].iloc[0]].to_parquet(path, index=False)
    _record_evaluation(experiment, "vipo-s0")


def _replace(old: str, new: str) -> Callable[[Path], None]:
    def change(experiment: Path) -> None:
        path = experiment / "evaluation/vipo-s0/config.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        _record_evaluation(experiment, "vipo-s0")

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_fewer_prompts, "other prompts or samples: 20 in A, 18 in B, 18 in both"),
        (_replace("seed: 1234", "seed: 5"), "other noise: evaluation.seed 1234 in A, 5 in B"),
        (_replace("height: 64", "height: 32"), "other noise: the generators' family or size differs"),
    ],
)
def test_what_cannot_be_paired_is_said(experiment: Path, change: Callable[[Path], None], told: str) -> None:
    change(experiment)
    found = _diff(experiment, "grpo-s0", "vipo-s0")
    assert found.evaluation is not None
    assert found.evaluation.unpaired == told
    tables = [pd.read_parquet(experiment / "evaluation" / run / "scores.parquet") for run in ("grpo-s0", "vipo-s0")]
    left, right = (table[table["final"]] for table in tables)
    for row in found.evaluation.scores:
        expected = independent_difference(right, left, row.column)
        assert (row.difference, row.low, row.high) == (expected.estimate, expected.low, expected.high)
    assert f"NOT paired ({told})" in render_diff(found)


def test_a_score_of_one_run_alone_is_named(experiment: Path) -> None:
    path = experiment / "evaluation/vipo-s0/scores.parquet"
    pd.read_parquet(path).drop(columns="reward/redness").to_parquet(path, index=False)
    found = _diff(experiment, "grpo-s0", "vipo-s0")
    assert found.evaluation is not None
    assert found.evaluation.missing == ("reward/redness",)
    assert found.notes == (f"{path}: changed since its stage wrote it",)
    assert "Not of both runs: reward/redness." in render_diff(found)


def test_samples_without_a_score_are_left_out_of_both_and_told(experiment: Path) -> None:
    path = experiment / "evaluation/vipo-s0/scores.parquet"
    table = pd.read_parquet(path)
    lacking = table["final"] & (table["prompt_id"] == table["prompt_id"].iloc[0]) & (table["sample"] == 0)
    table.assign(**{"reward/redness": table["reward/redness"].where(~lacking)}).to_parquet(path)
    told = render_diff(_diff(experiment, "grpo-s0", "vipo-s0"))
    assert "reward/redness (samples left out: 1)" in told
    assert "reward/object_redness (samples" not in told


def test_the_base_has_scores_and_no_training(experiment: Path) -> None:
    found = _diff(experiment, "base-s0", "vipo-s0")
    assert found.training is None
    assert found.evaluation is not None
    rows = {row.column: row for row in found.evaluation.scores}
    assert rows["change/total"].a == 0
    assert rows["reward/object_redness"].better == "higher"
    assert found.notes == ("base-s0 is the generator as it was: it has no training to compare",)
    assert found.recorded == ("score",)
    assert "## Code (stage score alone): no difference\n" in render_diff(found)


def test_what_is_missing_is_said_and_not_guessed(experiment: Path) -> None:
    (experiment / "runs/vipo-s0/provenance.json").unlink()
    for name in ("provenance.json", "scores.parquet"):
        (experiment / "evaluation/grpo-s0" / name).unlink()
    found = _diff(experiment, "grpo-s0", "vipo-s0")
    assert found.evaluation is None
    assert found.training is not None
    assert found.training.same_weights is None
    assert found.notes == (
        "grpo-s0 has no scores here: run vipo evaluate with its configuration, or pull them",
        "vipo-s0 has no final weights here: it did not finish training, or they were not pulled",
    )
    text = render_diff(found)
    assert "Evaluation" not in text
    assert "note: grpo-s0 has no scores here" in text
    assert "Final weights: not known: a run has none here." in text
    (experiment / "runs/vipo-s0/metrics.jsonl").unlink()
    found = _diff(experiment, "grpo-s0", "vipo-s0")
    assert found.training is None
    assert found.notes[2] == f"{experiment / 'runs/vipo-s0/metrics.jsonl'}: not here, so the training is not compared"


def _as_pulled(experiment: Path, run: str, weights: str) -> None:
    """Only what DVC keeps: the configurations, metrics, weights and scores, without the records."""
    folder, evaluated = experiment / "runs" / run, experiment / "evaluation" / run
    for place in (folder, evaluated):
        (place / "provenance.json").unlink()
    shutil.copy(evaluated / "config.yaml", folder / "config.yaml")
    (folder / "weights").mkdir()
    (folder / "weights/a.safetensors").write_text(weights)


def test_pulled_results_are_compared_as_far_as_they_go(experiment: Path) -> None:
    """A pull brings no records: what was not compared is not called equal, and what is there is not called missing."""
    before = _diff(experiment, "grpo-s0", "vipo-s0")
    for run, weights in (("grpo-s0", "1"), ("vipo-s0", "2"), ("vipo-s1", "2")):
        _as_pulled(experiment, run, weights)
    found = _diff(experiment, "grpo-s0", "vipo-s0")
    assert (found.config, found.training, found.evaluation) == (before.config, before.training, before.evaluation)
    assert (found.recorded, found.code, found.environment, found.data) == ((), None, None, None)
    why = "is not recorded here (a pull brings no provenance.json): no code, environment, data to compare"
    assert found.notes == tuple(
        f"the {stage} of {run} {why}" for run in ("grpo-s0", "vipo-s0") for stage in ("training", "evaluation")
    )
    text = render_diff(found)
    for title in ("Code", "Environment", "Data"):
        assert f"## {title}: not recorded here\n" in text
    assert "no difference\n" not in text
    same = _diff(experiment, "vipo-s0", "vipo-s1").training
    assert same is not None
    assert same.same_weights


def test_a_pulled_evaluation_is_of_the_configuration_beside_it(experiment: Path) -> None:
    _as_pulled(experiment, "vipo-s0", "2")
    evaluated = experiment / "evaluation/vipo-s0/config.yaml"
    text = evaluated.read_text()
    evaluated.write_text(text.replace("  steps: 20", "  steps: 10"))
    found = _diff(experiment, "vipo-s1", "vipo-s0")
    assert "evaluation.steps" in [row.key for row in found.config]
    evaluated.write_text(text.replace("updates: 24", "updates: 25"))
    [*_, note] = _diff(experiment, "vipo-s1", "vipo-s0").notes
    assert note.endswith("vipo-s0: was made with another configuration; evaluate vipo-s0 again")


def test_pulled_weights_that_were_evaluated_here(experiment: Path) -> None:
    _as_pulled(experiment, "vipo-s0", "2")
    _record_evaluation(experiment, "vipo-s0")
    weights = experiment / "runs/vipo-s0/weights/a.safetensors"
    read = {"path": "results/demo/runs/vipo-s0/weights/a.safetensors", "bytes": 1, "sha256": file_sha256(weights)}
    _edit(experiment / "evaluation/vipo-s0/provenance.json", lambda record: record["inputs"].append(read))
    found = _diff(experiment, "vipo-s1", "vipo-s0")
    assert found.recorded == ("score",)
    assert [note for note in found.notes if "weights" in note] == []
    weights.write_text("others")
    [*_, note] = _diff(experiment, "vipo-s1", "vipo-s0").notes
    assert note.endswith("was made with other weights than vipo-s0 has now; evaluate it again")


def test_scores_of_the_trained_weights_are_not_those_of_their_mean(experiment: Path) -> None:
    """As an earlier vipo scored them."""
    trained = {f"weights/{place}a.safetensors": f"{number}" * 64 for number, place in enumerate(("", "ema/"))}
    entries = [
        {"path": f"results/demo/runs/vipo-s0/{place}", "bytes": 1, "sha256": sha256}
        for place, sha256 in trained.items()
    ]
    _edit(experiment / "runs/vipo-s0/provenance.json", lambda record: record.update(outputs=entries))
    path = experiment / "evaluation/vipo-s0/config.yaml"
    text = path.read_text().replace("ema_decay: null", "ema_decay: 0.9")
    # Where the trained ones were drawn, their mean lies below and is recorded too.
    for evaluated, read, told in (
        ("trained", entries, None),
        ("ema", entries[1:], None),
        ("ema", entries, "was made with the weights 'trained', evaluation.weights is 'ema'; evaluate it again"),
        ("trained", entries[1:], "was made with the weights 'ema', evaluation.weights is 'trained'; evaluate it again"),
    ):
        assert "weights: trained" in text
        path.write_text(text.replace("weights: trained", f"weights: {evaluated}"))
        _record_evaluation(experiment, "vipo-s0")
        _edit(path.with_name("provenance.json"), lambda record, new=read: record["inputs"].extend(new))
        notes = _diff(experiment, "grpo-s0", "vipo-s0").notes
        assert [note.partition("vipo-s0: ")[2] for note in notes] == ([] if told is None else [told])


def test_an_evaluation_of_another_configuration_is_said(experiment: Path) -> None:
    path = experiment / "evaluation/vipo-s0/provenance.json"
    _edit(path, lambda record: record.update(config_sha256="00" * 32))
    [note] = _diff(experiment, "grpo-s0", "vipo-s0").notes
    assert note.endswith("vipo-s0: was made with another configuration; evaluate vipo-s0 again")


@pytest.mark.parametrize("wrong", ["runs/vipo-s9", "runs", ".", "evaluation/vipo-s0", "../../.."])
def test_no_run_is_a_clear_error(experiment: Path, wrong: str) -> None:
    with pytest.raises(VipoError, match=r"no run is there; give a folder results/<experiment>/runs/<arm>-s<seed>"):
        diff_runs(experiment / wrong, experiment / "runs/vipo-s0")


def test_runs_of_two_results_folders(experiment: Path, tmp_path: Path) -> None:
    other = shutil.copytree(experiment, tmp_path / "elsewhere" / "renamed")
    path = other / "evaluation" / "vipo-s1" / "config.yaml"
    path.write_text(path.read_text().replace("name: demo", "name: renamed"))
    found = diff_runs(experiment / "runs/vipo-s0", other / "runs/vipo-s1")
    assert {row.key: row.decides for row in found.config} == {"seed": "training", "experiment.name": "nothing"}
    assert found.evaluation is not None
    assert found.evaluation.unpaired is None
    assert found.notes == ()
