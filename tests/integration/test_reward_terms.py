"""A run on rewards with arguments, from training to scores: labels, what they are recorded with, and resume."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from reward_checkpoints import write_clip

from vipo.config.compose import load_config, repository_root
from vipo.provenance import read_provenance
from vipo.provenance.reward_files import reward_inputs
from vipo.rewards import RewardError
from vipo.stages import evaluate_stage, train_stage
from vipo.training.setup import set_up
from vipo.training.state import run_identity


@pytest.mark.parametrize("resident", ["keep", "free"])
def test_two_terms_of_one_reward_are_trained_measured_and_recorded(
    resident: str, prepared: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    results = tmp_path / "results"
    shutil.copytree(prepared, results)
    clip = write_clip(tmp_path / "clip")
    options = f"path: {clip}, resident: {resident}"
    overrides = [
        *tiny_overrides,
        "arm=grpo",
        f'reward.terms=[{{name: clipscore, label: sharp, options: {{{options}, template: "sharp {{}}"}}}}, '
        f"{{name: clipscore, weight: 0.5, options: {{{options}}}}}]",
        f"evaluation.rewards=[redness, sharp, {{name: clipscore, label: again, options: {{{options}}}}}]",
        "training.updates=1",
        "training.save_at=[]",
        "evaluation.prompts=2",
    ]
    config, root = load_config(overrides), repository_root()
    train_stage(config, root, results)
    run = results / "demo" / "runs" / "grpo-s0"
    (row,) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert row["reward/sharp/mean"] != row["reward/clipscore/mean"]
    assert row["reward/mean"] == pytest.approx(row["reward/sharp/mean"] + 0.5 * row["reward/clipscore/mean"], rel=1e-5)
    recorded = {Path(entry["path"]).name for entry in read_provenance(run / "provenance.json")["inputs"]}
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= recorded

    evaluate_stage(config, root, results)
    evaluated = results / "demo" / "evaluation" / "grpo-s0"
    scores = pd.read_parquet(evaluated / "scores.parquet")
    assert [name for name in scores if name.startswith("reward/")] == [
        "reward/redness", "reward/sharp", "reward/again", "reward/clipscore",
    ]  # fmt: skip
    assert scores["reward/again"].tolist() == scores["reward/clipscore"].tolist()
    assert scores["reward/again"].tolist() != scores["reward/sharp"].tolist()
    recorded = {Path(entry["path"]).name for entry in read_provenance(evaluated / "provenance.json")["inputs"]}
    assert "model.safetensors" in recorded
    told = reward_inputs(read_provenance(evaluated / "provenance.json"))
    assert {entry["of"] for entry in told or ()} == {f"reward {label}" for label in ("sharp", "again", "clipscore")}

    if resident == "keep":
        # Other weights under the same path: another run.
        before = run_identity(set_up(config, root, results / "demo"))
        assert before == run_identity(set_up(config, root, results / "demo"))
        write_clip(clip, seed=1)
        assert before != run_identity(set_up(config, root, results / "demo"))


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_reward_that_is_only_measured_is_looked_for_before_anything_is_loaded(
    stage: str, prepared: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("the generator was loaded")

    monkeypatch.setattr("vipo.training.setup.load_generator", loads)
    monkeypatch.setattr("vipo.evaluation.sample.load_generator", loads)
    reward = f"evaluation.rewards=[{{name: aesthetic, options: {{path: {tmp_path}, head: no_such.pth}}}}]"
    config = load_config([*tiny_overrides, "arm=grpo", reward])
    root, experiment = repository_root(), prepared / "demo"
    begin: dict[str, Callable[[], object]] = {
        "train": lambda: set_up(config, root, experiment),
        "evaluate": lambda: evaluate_stage(config.as_base(), root, prepared),
    }
    with pytest.raises(RewardError, match=r"head 'no_such\.pth': there is no such file or folder"):
        begin[stage]()
