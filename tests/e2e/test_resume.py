"""The resume contract: killed at any instant, the rerun ends bit-identical to the run that nobody disturbed."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_rewards import standing
from nursery import Nurseries
from waits import SECONDS, ended, eventually

from vipo.config.compose import load_config, repository_root
from vipo.provenance.locks import run_lock
from vipo.stages import train_stage
from vipo.training.checkpoints import list_checkpoints
from vipo.training.setup import set_up
from vipo.training.state import run_identity
from vipo.training.update import update

VIPO = str(Path(sys.executable).with_name("vipo"))
ROOT = repository_root()
HERE = Path(__file__).parent


def _artifacts(run: Path) -> dict[str, bytes]:
    """Everything that must be identical: metrics, configuration, all kept weights."""
    files = [run / "metrics.jsonl", run / "config.yaml", *run.glob("weights/**/*.*"), *run.glob("updates/**/*.*")]
    assert len(files) >= 4
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


Train = Callable[..., list[str]]


@pytest.fixture
def train(forks: Nurseries) -> Train:
    """Train in each results folder, killed at the given moments (see kill_and_resume.py): how each try ended."""

    def run(overrides: list[str], *jobs: tuple[Path, list[list[float] | None]]) -> list[str]:
        status, out, err = forks.run(HERE / "kill_and_resume.py", json.dumps(jobs, default=str), *overrides, cwd=ROOT)
        assert status == 0, err
        return out.splitlines()

    return run


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_killed_anywhere_ends_identically(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, train: Train, lora: bool
) -> None:
    overrides = [
        *tiny_overrides,
        "arm=vipo",
        "training.updates=16",
        "training.save_at=[3]",
        "training.checkpoint_every=2",
    ]
    if lora:
        overrides.append("training.lora={rank: 2, alpha: 2.0}")
    whole, disturbed = shutil.copytree(prepared, tmp_path / "whole"), shutil.copytree(prepared, tmp_path / "disturbed")
    # While loading, then at random instants of later and later updates: rollout, learning, writing, between them.
    moments, seconds = random.Random(7), 0.08
    kills: list[list[float] | None] = [[0, moments.uniform(0.1, 0.8)]]
    kills += [[updates, moments.uniform(0, seconds)] for updates in ((1, 3, 6, 8, 10, 13) if not lora else (3, 9))]
    undisturbed, *outcomes = train(overrides, (whole, [None]), (disturbed, [*kills, None]))
    assert [text.split()[0] for text in outcomes[:-1]] == ["killed"] * len(kills)
    assert undisturbed == outcomes[-1] == "finished 0 16"
    run = "demo/runs/vipo-s0"
    assert _artifacts(whole / run) == _artifacts(disturbed / run)
    assert not list((disturbed / run).rglob("*.partial"))


def test_preemption_writes_a_checkpoint_first(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, train: Train, forks: Nurseries
) -> None:
    """Through the command line: SIGTERM, exit 75, rerun, the same bytes."""
    overrides = [
        *tiny_overrides,
        "arm=grpo",
        "training.updates=6",
        "training.checkpoint_every=6",
        "training.save_at=[]",
        "reward.terms=[{name: 'bad_rewards:Stands'}]",
    ]
    results = shutil.copytree(prepared, tmp_path / "results")
    run = results / "demo/runs/grpo-s0"
    armed = tmp_path / "armed"
    armed.touch()
    said = tmp_path / "said"
    # In the third update: a trial, and two micro-batches an update.
    environment = os.environ | {"PYTHONPATH": str(HERE), "STAND": str(armed), "STAND_AT": "6"}
    command = [VIPO, "train", *overrides, "--results", str(results)]
    with said.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=stream)
    eventually("training stands still", standing(armed).exists, ended(process, said))
    assert (run / "metrics.jsonl").read_text().count("\n") == 2
    process.send_signal(signal.SIGTERM)
    process.wait(SECONDS)
    message = said.read_text()
    assert process.returncode == 75, message
    assert "stopped by SIGTERM after update" in message
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    assert 2 <= int(checkpoint.name) < 6
    assert not (run / "provenance.json").exists()
    assert forks.run(*command, cwd=ROOT, env=environment)[0] == 0
    whole = shutil.copytree(prepared, tmp_path / "whole")
    assert train(overrides, (whole, [None])) == ["finished 0 6"]
    assert _artifacts(run) == _artifacts(whole / "demo/runs/grpo-s0")


@pytest.mark.parametrize(("stage", "folder"), [("train", "runs/grpo-s0"), ("prepare", "prompts")])
def test_a_signal_outside_of_training_asks_for_another_try_too(
    prepared: Path, tiny_overrides: list[str], stage: str, folder: str, tmp_path: Path
) -> None:
    """While a stage waits for another process that writes its folder, as while it loads: 75, nothing is written."""
    results = shutil.copytree(prepared, tmp_path / "results")
    command = [VIPO, stage, *tiny_overrides, "arm=grpo", "--results", str(results), "--wait", str(SECONDS)]

    def written() -> dict[str, bytes]:
        found = (path for path in (results / "demo" / folder).iterdir() if not path.name.startswith(".lock"))
        return {path.name: path.read_bytes() for path in found}

    with run_lock(results / "demo" / folder):
        before = written()
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        said = list[str]()
        while not said or "another process writes it" not in said[-1]:
            said.append(process.stderr.readline())
            assert said[-1], f"ended before it waited for the lock: {said}"
        process.send_signal(signal.SIGTERM)
        assert "error: stopped by SIGTERM; start the same command again" in process.communicate()[1]
    assert process.returncode == 75
    assert written() == before


def test_another_learning_rate_never_resumes(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = shutil.copytree(prepared, tmp_path / "results")
    run = results / "demo/runs/grpo-s0"
    train_stage(load_config([*tiny_overrides, "arm=grpo"]), ROOT, results)
    first = _artifacts(run)
    with caplog.at_level(logging.WARNING):
        train_stage(load_config([*tiny_overrides, "arm=grpo", "optimizer.learning_rate=1e-4"]), ROOT, results)
    assert "made by another configuration" in caplog.text
    (aside,) = (results / "demo/.superseded").glob("*/runs/grpo-s0")
    assert _artifacts(aside) == first
    assert _artifacts(run)["metrics.jsonl"] != first["metrics.jsonl"]
    fresh = shutil.copytree(prepared, tmp_path / "fresh")
    train_stage(load_config([*tiny_overrides, "arm=grpo", "optimizer.learning_rate=1e-4"]), ROOT, fresh)
    assert _artifacts(run) == _artifacts(fresh / "demo/runs/grpo-s0")

    # Finished, and copied without its checkpoints: what it was made with nobody knows, so it is kept all the same.
    second = _artifacts(run)
    shutil.rmtree(run / "checkpoints")
    train_stage(load_config([*tiny_overrides, "arm=grpo"]), ROOT, results)
    assert _artifacts(run) == first
    assert second in [_artifacts(aside) for aside in (results / "demo/.superseded").glob("*/runs/grpo-s0")]


def test_truncated_newest_checkpoint_is_named_and_passed_over(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = shutil.copytree(prepared, tmp_path / "results")
    run = results / "demo/runs/vipo-s0"
    config = load_config([*tiny_overrides, "arm=vipo"])
    train_stage(config, ROOT, results)
    whole = _artifacts(run)
    newest, before = list_checkpoints(run / "checkpoints")
    tensors = newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    # As if it were not finished: a run that is reads no checkpoint.
    (run / "provenance.json").unlink()
    with caplog.at_level(logging.INFO):
        train_stage(config, ROOT, results)
    assert str(tensors) in caplog.text
    assert "the checkpoint before it is used" in caplog.text
    assert f"resumed after update {int(before.name)} of 4" in caplog.text
    assert _artifacts(run) == whole


def test_outputs_that_a_workflow_deleted_come_back(prepared: Path, tiny_overrides: list[str], tmp_path: Path) -> None:
    """Snakemake deletes a killed job's declared outputs: the metrics travel with the checkpoint."""
    results = shutil.copytree(prepared, tmp_path / "results")
    run = results / "demo/runs/grpo-s0"
    config = load_config([*tiny_overrides, "arm=grpo"])
    train_stage(config, ROOT, results)
    whole = _artifacts(run)
    for name in ("metrics.jsonl", "config.yaml", "provenance.json"):
        (run / name).unlink()
    train_stage(config, ROOT, results)
    assert _artifacts(run) == whole
    # Kept weights that are gone cannot be made again from a later checkpoint: what is finished beside them stays.
    shutil.rmtree(run / "updates/000002")
    train_stage(config, ROOT, results)
    assert _artifacts(run) == whole
    (aside,) = (results / "demo/.superseded").glob("*/runs/grpo-s0")
    left = _artifacts(aside)
    assert left == {name: content for name, content in whole.items() if name in left}
    assert {name.split("/")[0] for name in whole.keys() - left.keys()} == {"updates"}


def test_same_result_whatever_the_checkpoint_rhythm(prepared: Path, tiny_overrides: list[str], tmp_path: Path) -> None:
    config = load_config([*tiny_overrides, "arm=grpo"])
    other = load_config([*tiny_overrides, "arm=grpo", "training.checkpoint_every=3", "training.keep_checkpoints=1"])
    assert config.training_identity() == other.training_identity()
    a, b = shutil.copytree(prepared, tmp_path / "a"), shutil.copytree(prepared, tmp_path / "b")
    train_stage(config, ROOT, a)
    train_stage(other, ROOT, b)
    first, second = _artifacts(a / "demo/runs/grpo-s0"), _artifacts(b / "demo/runs/grpo-s0")
    del first["config.yaml"], second["config.yaml"]
    assert first == second


def test_arms_differ_only_where_they_should(prepared: Path, tiny_overrides: list[str]) -> None:
    """Same seed, same first rollout: the first update's reward is the same for every arm."""
    first = {}
    for arm in ("grpo", "vipo", "uniform", "inverted"):
        setup = set_up(load_config([*tiny_overrides, f"arm={arm}"]), ROOT, prepared / "demo")
        first[arm] = update(setup, 1)
    assert len({metrics["reward/mean"] for metrics in first.values()}) == 1
    assert all(metrics["log_ratio/max_before_first_step"] < 1e-5 for metrics in first.values())
    assert first["uniform"]["map/mean"] == 1
    assert first["vipo"]["map/mean"] == pytest.approx(1 - first["inverted"]["map/mean"], abs=1e-5)
    assert "map/mean" not in first["grpo"]


def test_identity_covers_the_generators_bytes(
    prepared: Path, tiny_generator: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    """Other weights at the same path are another run, even where the embeddings are the same."""
    generator = shutil.copytree(tiny_generator, tmp_path / "generator")
    config = load_config([*tiny_overrides, "arm=grpo", f"generator.path={generator}"])
    before = run_identity(set_up(config, ROOT, prepared / "demo"))
    (generator / "README.md").write_text("A comment.")
    (generator / "provenance.json").write_text("{}")
    assert run_identity(set_up(config, ROOT, prepared / "demo")) == before
    weights = generator / "transformer/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert run_identity(set_up(config, ROOT, prepared / "demo")) != before
