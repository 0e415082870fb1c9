"""The DAG through snakemake, in a project folder of its own: runs, does nothing twice, reruns exactly what changed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from vipo.config.compose import repository_root

ROOT = repository_root()
pytestmark = pytest.mark.xdist_group("workflow")

ARMS = [
    "~experiment.arms.uniform",
    "~experiment.arms.inverted",
    "experiment.arms.grpo.seeds=[0]",
    "experiment.arms.vipo.seeds=[0]",
]

REPORTS = {"summarize", "report", "crate"}


def _snakemake(project: Path, overrides: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["snakemake", "--profile", "workflow/profiles/local", *arguments, "--config", "experiment=demo"]
    command.append(f"overrides={json.dumps(overrides)}")
    return subprocess.run(command, cwd=project, env=environment, text=True, capture_output=True)


def _planned(project: Path, overrides: list[str]) -> set[str]:
    """Jobs that a dry run would do, as ``rule`` or ``rule run``."""
    result = _snakemake(project, overrides, "--dry-run")
    assert result.returncode == 0, result.stdout + result.stderr
    text = result.stdout + result.stderr
    jobs = set()
    for block in re.split(r"\n(?=(?:local)?rule )", text):
        name = re.match(r"(?:local)?rule (\w+):", block)
        if name and name[1] != "all":
            run = re.search(r"wildcards: run=([\w-]+)", block)
            jobs.add(f"{name[1]} {run[1]}" if run else name[1])
    if not jobs:
        assert "Nothing to be done" in text
    return jobs


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a checkout holds beside the package."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("configs", "workflow", "data/prompts"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("Snakefile", "requirements.lock", "CITATION.cff"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_dag_runs_once_and_reruns_what_changed(project: Path, tiny_overrides: list[str]) -> None:
    overrides = [*(text for text in tiny_overrides if not text.startswith("experiment=")), *ARMS]
    runs = ["base-s0", "grpo-s0", "vipo-s0"]
    trained, stages = runs[1:], {"prepare", "encode", *REPORTS}
    everything = stages | {f"evaluate {run}" for run in runs} | {f"train {run}" for run in trained}
    assert _planned(project, overrides) == everything

    result = _snakemake(project, overrides)
    assert result.returncode == 0, result.stdout + result.stderr
    # A line a job, then that it is done; what stages and Snakemake say is in the logs.
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("  ", "Using profile "))]
    assert [line.split("]")[0] for line in lines[:-1]] == [f"[{number}/10" for number in range(1, 11)], result.stderr
    assert re.search(r"^\[\d+/10\] train vipo-s0: .* s, reward -?\d\.\d+ -> -?\d\.\d+", result.stderr, re.MULTILINE)
    assert lines[-1].startswith("10 jobs done in ")
    experiment = project / "results/demo"
    logs = {path.stem: path.read_text() for path in (experiment / "logs").iterdir()}
    assert "vipo-s0: samples: 100%" in logs["evaluate-vipo-s0"]
    assert "24/24" in logs["evaluate-vipo-s0"]
    assert not [name for name, text in logs.items() if "Loading " in text]
    page = (experiment / "report/index.html").read_text()
    assert "Redder objects" in page
    assert (experiment / "ro-crate-metadata.json").is_file()
    scores = pd.concat(pd.read_parquet(experiment / f"evaluation/{run}/scores.parquet") for run in runs)
    assert set(scores.groupby("run")["update"].unique().map(list).map(tuple)) == {(0,), (2, 4)}
    assert scores.groupby(["run", "update"]).size().unique().tolist() == [8]
    base = scores[scores["run"] == "base-s0"]
    assert float(base["change/total"].abs().max()) == 0
    assert {path.name for path in project.iterdir()} <= {
        "configs", "workflow", "data", "Snakefile", "requirements.lock", "CITATION.cff", "results", ".snakemake"
    }  # fmt: skip

    # A finished experiment: nothing to do, whatever comment is added to a configuration.
    assert _planned(project, overrides) == set()
    demo = project / "configs/experiment/demo.yaml"
    demo.write_text(demo.read_text() + "\n# A comment changes nothing.\n")
    assert _planned(project, overrides) == set()

    # One arm's learning rate: its run, its evaluation, the report and the crate, nothing else.
    changed = [*overrides, 'experiment.arms.grpo.overrides=["optimizer.learning_rate=1e-4"]']
    assert _planned(project, changed) == {"train grpo-s0", "evaluate grpo-s0", *REPORTS}
    # How the report draws its intervals is no reason to train.
    assert _planned(project, [*overrides, "evaluation.confidence=0.9"]) == REPORTS
    # How often checkpoints are written changes no result; what a run trains on does not touch the base.
    assert _planned(project, [*overrides, "training.keep_checkpoints=3"]) == set()
    # Nor where the jobs run.
    moved = ["cluster.train.partition=long", "cluster.account=chem", "distribution.nodes=2", "distribution.processes=4"]
    assert _planned(project, [*overrides, *moved]) == set()
    eta = _planned(project, [*overrides, "sampling.eta=0.5"])
    assert eta == {*(f"{stage} {run}" for stage in ("train", "evaluate") for run in trained), *REPORTS}


def test_an_arm_cannot_ask_for_other_jobs_than_the_rest(project: Path, tiny_overrides: list[str]) -> None:
    result = _snakemake(
        project, [*ARMS, 'experiment.arms.grpo.overrides=["cluster.train.memory_mb=9000"]'], "--dry-run"
    )
    assert result.returncode != 0
    assert "run grpo-s0 changes its cluster, distribution, device or threads" in result.stdout + result.stderr


def test_wrong_key_stops_before_anything_runs(project: Path, tiny_overrides: list[str]) -> None:
    result = _snakemake(project, ["training.updtes=3"], "--dry-run")
    assert result.returncode != 0
    assert "error: experiment demo: training.updtes: unknown key; did you mean 'updates'?" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("to go on: mend that, then snakemake --profile ")
