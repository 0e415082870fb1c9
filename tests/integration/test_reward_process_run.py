"""A run whose reward is another process: the same bytes as without, its record, its resume, and its death."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from vipo.config.compose import load_config, repository_root
from vipo.provenance import read_provenance
from vipo.rewards import RewardError
from vipo.stages import MEASURED, credit_stage, evaluate_stage, train_stage
from vipo.training.setup import set_up
from vipo.training.state import run_identity

DYING = """
import os
from pathlib import Path

class Dies:
    def __init__(self, device, after, count):
        self._after, self._count = after, Path(count)

    def __call__(self, pictures, prompts, metadata):
        seen = int(self._count.read_text()) if self._count.exists() else 0
        self._count.write_text(str(seen + len(pictures)))
        if seen + len(pictures) > self._after:
            os._exit(3)
        return [sum(p.getdata(0)) / p.width for p in pictures]
"""


ROUNDED = """
from vipo.rewards.pixels import grey_levels
from vipo.rewards.redness import redness

def rounded(images, prompts, metadata):
    "As of pictures that travelled."
    return redness(grey_levels(images).float() / 255, prompts, metadata)
"""


def test_a_process_gives_a_run_its_very_bytes_and_stands_in_its_record(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rounded_redness.py").write_text(ROUNDED)
    monkeypatch.syspath_prepend(tmp_path)
    root, runs = repository_root(), {}
    common = [*tiny_overrides, "arm=grpo", "training.updates=2", "evaluation.prompts=2"]
    process = f"{{name: process, label: r, options: {{reward: redness, environment: {sys.executable}}}}}"
    named = {"here": "{name: 'rounded_redness:rounded', label: r}", "there": process}
    for name, term in named.items():
        results = tmp_path / name
        shutil.copytree(prepared, results)
        config = load_config([*common, f"reward.terms=[{term}]", "evaluation.rewards=[object_redness]"])
        train_stage(config, root, results)
        evaluate_stage(config, root, results)
        run = results / "demo" / "runs" / "grpo-s0"
        runs[name] = run
    assert (runs["here"] / "metrics.jsonl").read_bytes() == (runs["there"] / "metrics.jsonl").read_bytes()
    weights = "weights/transformer/diffusion_pytorch_model.safetensors"
    assert (runs["here"] / weights).read_bytes() == (runs["there"] / weights).read_bytes()
    tables = [pd.read_parquet(tmp_path / name / "demo/evaluation/grpo-s0/scores.parquet") for name in named]
    assert tables[0].equals(tables[1])

    record = read_provenance(runs["there"] / "provenance.json")
    told = record["reward_processes"]["r"]
    assert told["packages"]["torch"]
    assert told["code"]["vipo"] == record["package_sha256"]
    assert "reward_processes" not in read_provenance(runs["here"] / "provenance.json")
    evaluated = tmp_path / "there/demo/evaluation/grpo-s0/provenance.json"
    assert read_provenance(evaluated)["reward_processes"]["r"] == told

    # It runs elsewhere: the same run. It is another program: another run, and nothing is measured with it.
    def config_of(options: str) -> Any:
        changed = process.replace("}}", f", {options}}}}}")
        return load_config([*common, f"reward.terms=[{changed}]", "evaluation.rewards=[object_redness]"])

    assert config_of("timeout: 99.0, device: cpu").training_identity() == config.training_identity()
    assert config_of("batch: 3").training_identity() != config.training_identity()
    setup = set_up(config, root, tmp_path / "there/demo")
    before = run_identity(setup)
    setup.rewards["r"].identity["packages"]["torch"] = "0"  # type: ignore[attr-defined]
    assert run_identity(setup) != before
    data = json.loads((runs["there"] / "provenance.json").read_text())
    data["reward_processes"]["r"]["packages"]["torch"] = "0"
    (runs["there"] / "provenance.json").write_text(json.dumps(data))
    with pytest.raises(RewardError, match=r"'r': is not the process that .*provenance\.json tells of: packages torch"):
        evaluate_stage(config, root, tmp_path / "there")


def test_its_death_stops_the_run_and_the_last_checkpoint_goes_on(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    results, root = tmp_path / "results", repository_root()
    shutil.copytree(prepared, results)

    # The trial of one sample, and two updates of eight.
    arguments = f"{{after: 17, count: {tmp_path / 'count'}}}"
    options = f"{{reward: 'dying:Dies', environment: {sys.executable}, arguments: {arguments}}}"
    terms = f"reward.terms=[{{name: process, label: r, options: {options}}}]"
    config = load_config([*tiny_overrides, "arm=grpo", "training.save_at=[]", "training.updates=3", terms])
    with pytest.raises(RewardError, match=r"its process ended \(status 3"):
        train_stage(config, root, results)
    run = results / "demo" / "runs" / "grpo-s0"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1].lstrip("0") == "2"
    (tmp_path / "count").write_text("-100")
    train_stage(config, root, results)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


def test_the_meter_tells_which_process_rewarded_and_begins_anew_with_another(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "measured_far.py"
    module.write_text(
        "def grey(pictures, prompts, metadata):\n    return [sum(p.getdata(0)) / p.width for p in pictures]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    results = shutil.copytree(prepared, tmp_path / "results")
    options = f"{{reward: 'measured_far:grey', environment: {sys.executable}}}"
    small = ["updates=1", "reference=0", "stepped=1", "held_out=1", "arms=[grpo]", "directions=[sgd]"]
    config = load_config(
        [
            *tiny_overrides,
            "arm=grpo",
            f"reward.terms=[{{name: process, label: r, options: {options}}}]",
            *(f"experiment.meter.{end}" for end in small),
        ]
    )
    told = []
    for comment in ("", "# Another program.\n"):
        module.write_text(module.read_text() + comment)
        credit_stage({"grpo": config}, config.experiment.meter, repository_root(), results)
        told.append(read_provenance(results / "demo/credit/base/provenance.json")["reward_processes"]["r"])
    assert told[0]["code"].keys() == told[1]["code"].keys() == {"serve.py", "measured_far.py"}
    assert told[0]["code"]["measured_far.py"] != told[1]["code"]["measured_far.py"]
    assert len(list((results / "demo/credit/base" / MEASURED).iterdir())) == 2
